"""The `steersman` command: what each command takes. What it does lies in modules imported when it runs."""

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from steersman.cli.cluster import ClusterFile, Context, Namespace, On, Target, Where
from steersman.cli.connection import (
    DEFAULT_ADDRESSES,
    PolicyAddress,
    ReferenceAddress,
    RewardAddress,
    Security,
    Timeout,
    TrainerAddress,
    credentials_of,
)
from steersman.cli.console import CleanGroup, CommandError, out, write
from steersman.cli.jobs import app as jobs_app
from steersman.cli.rewards import app as rewards_app
from steersman.client.types import JobKind, Overlength
from steersman.wire.roles import Role

app = typer.Typer(
    name="steersman",
    cls=CleanGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Online RLHF as gRPC services: run them, ask them, train with them.",
)
app.add_typer(jobs_app, name="jobs")
app.add_typer(rewards_app, name="rewards")

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def _version(wanted: bool) -> None:
    if wanted:
        write(f"steersman {metadata.version('steersman')}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    tls: Annotated[bool, typer.Option("--tls", envvar="STEERSMAN_TLS", help="Talk TLS to the services.")] = False,
    ca_file: Annotated[
        Path | None,
        typer.Option(envvar="STEERSMAN_CA_FILE", exists=True, dir_okay=False, help="PEM of the authorities to trust."),
    ] = None,
    cert_file: Annotated[
        Path | None,
        typer.Option(envvar="STEERSMAN_CERT_FILE", exists=True, dir_okay=False, help="PEM of the own certificate."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(envvar="STEERSMAN_KEY_FILE", exists=True, dir_okay=False, help="PEM of the own private key."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar="STEERSMAN_TOKEN_FILE", exists=True, dir_okay=False, help="File with a bearer token."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="STEERSMAN_TOKEN", help="A bearer token; other users see it unless the variable holds it."),
    ] = None,
) -> None:
    """Keeps the connection options for the command."""
    if token_file is not None:
        if token is not None:
            raise typer.BadParameter("a token is given twice, by --token-file and by --token; allowed: one of them")
        token = token_file.read_text(encoding="utf-8").strip()
    context.obj = Security(tls=tls, ca_file=ca_file, cert_file=cert_file, key_file=key_file, token=token)


@app.command()
def up(
    config: Annotated[Path, typer.Argument(help="YAML file of the services.", exists=True, dir_okay=False)],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not show what the services log.")] = False,
) -> None:
    """Run services as local processes until Ctrl-C.

    The file names the services and their settings:

        services:
          policy: {model: runs/sft/model}
          reward: {model: runs/reward/model}
          policy-2: {service: policy, model: runs/sft/model, port: 50061}

    Ports default to 50051 (policy), 50052 (reference), 50053 (reward) and 50054 (trainer).
    If a service does not come up or ends by itself, all are stopped, its last lines are shown,
    and the exit status is 1.
    """
    from steersman.cli import up as implementation

    implementation.run(config, quiet=quiet)


@app.command()
def status(
    context: typer.Context,
    policy: Annotated[str | None, typer.Option(envvar="STEERSMAN_POLICY_ADDRESS", help="Policy replicas.")] = None,
    reference: Annotated[str | None, typer.Option(envvar="STEERSMAN_REFERENCE_ADDRESS", help="Reference.")] = None,
    reward: Annotated[str | None, typer.Option(envvar="STEERSMAN_REWARD_ADDRESS", help="Reward.")] = None,
    trainer: Annotated[str | None, typer.Option(envvar="STEERSMAN_TRAINER_ADDRESS", help="Trainer.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each service.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show health, model and weight version of each service.

    Looks at the addresses given, or at all four default ones if none is. The exit status is 1 unless all serve.
    """
    from steersman.cli import status as implementation

    given = {"policy": policy, "reference": reference, "reward": reward, "trainer": trainer}
    targets = {service: target for service, target in given.items() if target} or dict(DEFAULT_ADDRESSES)
    rows = implementation.look_at_all(targets, credentials_of(context), timeout)
    if as_json:
        import json

        write(json.dumps(implementation.as_dicts(rows), indent=2) + "\n")
    else:
        out().print(implementation.table(rows))
    if not all(row.is_serving for row in rows):
        raise typer.Exit(1)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a conversation.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the conversation; implies --chat.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="The prompt is token ids, for example '1 2 3'.")] = False,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, max=256, help="Responses to draw.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(max=1.0, help="Nucleus mass; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Most likely tokens kept; 0 is off.")] = 0,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-m", min=1, help="Longest response. Default: what fits.")
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=0, help="No end before so many tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same samples.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence.")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Sample responses to a prompt; a single one streams as it is made."""
    import sys

    from steersman.cli import generate as implementation
    from steersman.client.policy import PolicyClient
    from steersman.client.types import ChatMessage, Prompt

    text = sys.stdin.read() if prompt == "-" else prompt
    question: Prompt = text
    if ids:
        question = implementation.parse_ids(text)
    elif chat or system is not None:
        opening = [ChatMessage(role="system", content=system)] if system is not None else []
        question = [*opening, ChatMessage(role="user", content=text)]
    with PolicyClient(address, credentials=credentials_of(context)) as client:
        implementation.run(
            client,
            question,
            {
                "num_samples": num_samples,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "max_tokens": max_tokens,
                "min_tokens": min_tokens,
                "stop": stop or [],
                "seed": seed,
                "ignore_eos": ignore_eos,
                "return_text": not ids,
            },
            timeout,
            as_json,
        )


@app.command()
def score(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="Prompt and response a row: .jsonl, .jsonl.gz or .parquet; - is stdin.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Prompt of one inline item.")] = None,
    response: Annotated[list[str] | None, typer.Option("--response", "-r", help="Response; may be repeated.")] = None,
    source: Annotated[Path | None, typer.Option("--input", "-i", help="The file, as an option.")] = None,
    target: Annotated[
        Path, typer.Option("--output", "-o", help="A score a row: .jsonl or .parquet; - is stdout.")
    ] = Path("-"),
    address: RewardAddress = DEFAULT_ADDRESSES["reward"],
    scorer: Annotated[str, typer.Option(help="Name of the scorer. Default: the server's.")] = "",
    overlength: Annotated[Overlength, typer.Option(help="What to do with too long items.")] = Overlength.FAIL,
    include_raw: Annotated[bool, typer.Option("--include-raw", help="Also the score before normalisation.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start afresh, whatever the output holds.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Score rows with an error again.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for the call; of a file, for each 512 rows (600).")
    ] = None,
) -> None:
    """Score responses: inline, or a file of any length.

    A row has `prompt` and `response` (both text, or both token ids, or a list of messages and
    a reply), and may have `id` and `context`. Rows of the output keep the order, and hold `score`
    or `error`. The exit status is 1 if an item failed. However it was stopped, the same command
    goes on where the output ends.
    """
    from steersman.cli import jsonl, score_file
    from steersman.cli.score import score_row
    from steersman.client.reward import RewardClient
    from steersman.client.types import Priority

    inline = prompt is not None and bool(response)
    given = [path for path in (file, source) if path is not None]
    if inline + len(given) != 1:
        raise typer.BadParameter("give either a file (FILE or --input), or --prompt and --response")
    with RewardClient(address, credentials=credentials_of(context)) as client:
        if given:
            failed = score_file.run(
                client,
                score_file.ScoreFile(
                    source=given[0],
                    target=target,
                    scorer=scorer,
                    overlength=overlength,
                    include_raw=include_raw,
                    timeout=timeout,
                    overwrite=overwrite,
                    retry_failed=retry_failed,
                ),
            )
        else:
            scores = client.score(
                prompt=prompt,
                responses=response,
                scorer=scorer,
                overlength=overlength,
                priority=Priority.INTERACTIVE,
                include_raw=include_raw,
                timeout=timeout,
            )
            failed = sum(item.error is not None for item in scores)
            with jsonl.writer(target) as output:
                output.writelines(jsonl.dump(score_row(item)) for item in scores)
    if failed:
        raise CommandError(f"{failed} items have no score; their rows say why")


@app.command()
def logprobs(
    context: typer.Context,
    ids: Annotated[str | None, typer.Option("--ids", help="One sequence of token ids, for example '1 2 3'.")] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of its prompt.")] = 1,
    source: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="JSONL with token_ids and prompt_length in each row; - is stdin."),
    ] = None,
    target: Annotated[Path, typer.Option("--output", "-o", help="JSONL; - is stdout.")] = Path("-"),
    address: ReferenceAddress = DEFAULT_ADDRESSES["reference"],
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="Logits are divided by it.")] = 1.0,
    entropy: Annotated[bool, typer.Option("--entropy", help="Also the entropy in nats.")] = False,
    timeout: Timeout = None,
) -> None:
    """Log-probs of the response tokens of sequences under the reference model."""
    from steersman.cli import generate, jsonl
    from steersman.cli import score as implementation
    from steersman.client.reference import ReferenceClient

    if (ids is None) == (source is None):
        raise typer.BadParameter("give either --ids or --input")
    with ReferenceClient(address, credentials=credentials_of(context)) as client:
        if source is not None:
            implementation.logprobs_file(
                client, source, target, temperature=temperature, entropy=entropy, timeout=timeout
            )
            return
        result = client.logprobs(
            [generate.parse_ids(ids or "")], prompt_length, temperature=temperature, entropy=entropy, timeout=timeout
        )
        row = {"logprobs": result.logprobs[0].tolist()}
        if result.entropies is not None:
            row["entropies"] = result.entropies[0].tolist()
        with jsonl.writer(target) as file:
            file.write(jsonl.dump(row))


@app.command()
def train(
    context: typer.Context,
    kind: Annotated[JobKind, typer.Argument(help="What to train.")],
    config: Annotated[Path, typer.Argument(help="YAML file of the job's settings.", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting on top; may be repeated.")
    ] = None,
    job_id: Annotated[str | None, typer.Option(help="Id of the job. Default: the server chooses one.")] = None,
    address: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
    follow: Annotated[bool, typer.Option(help="Watch the job to its end.")] = True,
    nodes: Annotated[int, typer.Option(min=1, max=1000, help="Nodes, where jobs run in a cluster.")] = 1,
    processes: Annotated[
        int, typer.Option(min=0, max=64, help="Processes of each node. Default: one for each GPU, or one.")
    ] = 0,
    gpus: Annotated[int, typer.Option(min=0, max=64, help="GPUs of each node, one for each process.")] = 0,
    cpus: Annotated[float, typer.Option(min=0, help="CPU cores of each node. Default: the launcher's.")] = 0.0,
    memory_gib: Annotated[float, typer.Option(min=0, max=1e6, help="GiB of each node. Default: the launcher's.")] = 0.0,
    queue: Annotated[str, typer.Option(help="Kueue LocalQueue that admits the job.")] = "",
    image: Annotated[str, typer.Option(help="Container image of the worker, if the service allows it.")] = "",
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check the settings, start nothing.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings, print the Kubernetes objects, start nothing.")
    ] = False,
) -> None:
    """Submit a training job, and watch it.

    Ctrl-C stops watching, not the job. The exit status is 1 if the job does not succeed.

    With --on kubernetes the command makes the objects itself, by your kubeconfig and the pods that --cluster describes;
    no trainer service is needed. `steersman jobs ... --on kubernetes` shows such jobs.
    """
    from steersman.cli import train as implementation

    settings = implementation.read_config(config, overrides or [])
    resources = implementation.resources_of(
        nodes=nodes, processes=processes, gpus=gpus, cpus=cpus, memory_gib=memory_gib, queue=queue, image=image
    )
    how = implementation.How(validate_only=validate_only, dry_run=dry_run, follow=follow)
    if on is Where.KUBERNETES:
        target = Target(file=cluster_file, namespace=namespace, context=cluster_context)
        implementation.submit_to_cluster(target, kind, settings, resources, job_id, how)
    else:
        implementation.submit(address, credentials_of(context), kind, settings, resources, job_id, how)


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Name of the caller, for logs.", metavar="NAME")],
    role: Annotated[list[Role] | None, typer.Option("--role", help="What it may do; may be repeated.")] = None,
) -> None:
    """Make a token for a caller.

    The token goes to stdout, this once. Its entry for the servers' list of callers
    (`access_file`), which holds no more than a digest, goes to stderr.
    """
    from steersman.cli import caller_token

    caller_token.run(name, role or [])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def report(
    context: typer.Context,
    run_directory: Annotated[Path, typer.Argument(help="The run folder of a job.")],
) -> None:
    """Write the report of a run; further options go to the report itself. Needs the trainer's packages."""
    from steersman.cli import report as implementation

    implementation.run(run_directory, list(context.args))


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
