"""`steersman rewards`: the models of a reward server while it serves, and the scale of their scores.

Commands that change something take several addresses `a:1,b:2`, and do it at one server after the other: the first that
refuses ends it, and those after it are left as they are.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from steersman.cli.connection import DEFAULT_ADDRESSES, RewardAddress, Timeout, credentials_of
from steersman.cli.console import CleanGroup, CommandError, err, out, write

app = typer.Typer(
    cls=CleanGroup,
    no_args_is_help=True,
    help="Models of a reward server: list, load, switch, unload, check; and normalize, the scale of scores.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
AllowOther = Annotated[
    bool, typer.Option("--allow-other-tokenizer", help="Even if token ids mean something else to the model.")
]
ModelName = Annotated[str, typer.Argument(help="Name of the model.", metavar="MODEL")]


@app.command("list")
def list_models(
    context: typer.Context, address: RewardAddress = DEFAULT_ADDRESSES["reward"], as_json: AsJson = False
) -> None:
    """List the models: what they do, which scorers point to them, and why a load failed."""
    from rich.table import Table
    from rich.text import Text

    rows = []
    for target in _targets(address):
        with _client(context, target) as client:
            rows += [(target, model) for model in client.list()]
    if as_json:
        write(json.dumps([_as_dict(target, model) for target, model in rows], indent=2) + "\n")
        return
    shown = Table(box=None, pad_edge=False)
    for name in ("ADDRESS", "MODEL", "STATE", "SCORERS", "REVISION", "MB", "IN FLIGHT", "DETAIL"):
        shown.add_column(name, overflow="fold")
    for target, model in rows:
        revision = model.model.revision if model.model is not None else ""
        cells = (
            target,
            model.name,
            str(model.state),
            ", ".join(model.scorers),
            revision,
            f"{model.parameter_bytes / 1e6:.1f}",
            str(model.num_items_in_flight),
            model.error or model.source,
        )
        shown.add_row(*map(Text, cells))
    out().print(shown)


@app.command()
def load(
    context: typer.Context,
    name: ModelName,
    source: Annotated[str, typer.Argument(help="Folder below a model root of the server, or a hub id it allows.")],
    revision: Annotated[str, typer.Option(help="Revision of a hub id.")] = "",
    scorer: Annotated[str, typer.Option(help="Scorer it is meant for, whose settings it takes.")] = "",
    switch: Annotated[bool, typer.Option("--switch", help="Point that scorer to it as soon as it is ready.")] = False,
    unload_previous: Annotated[
        bool, typer.Option("--unload-previous", help="After the switch, unload the model before.")
    ] = False,
    allow_other_tokenizer: AllowOther = False,
    wait: Annotated[bool, typer.Option(help="Wait until it is ready.")] = True,
    address: RewardAddress = DEFAULT_ADDRESSES["reward"],
    timeout: Timeout = None,
) -> None:
    """Load a model while the others serve on. The exit status is 1 if it is not ready, or not switched to."""
    for target in _targets(address):
        with _client(context, target) as client:
            model = client.load(
                name,
                source,
                revision=revision,
                scorer=scorer,
                switch=switch,
                unload_previous=unload_previous,
                allow_other_tokenizer=allow_other_tokenizer,
                wait=wait,
                timeout=timeout,
            )
        served = f", and scorer {', '.join(model.scorers)} points to it" if model.scorers else ""
        out().print(f"{model.name} is {model.state}{served}")


@app.command()
def switch(
    context: typer.Context,
    scorer: Annotated[str, typer.Argument(help="Name of the scorer.", metavar="SCORER")],
    model: ModelName,
    allow_other_tokenizer: AllowOther = False,
    address: RewardAddress = DEFAULT_ADDRESSES["reward"],
) -> None:
    """Point a scorer to a loaded model; items that came before are scored by the model before."""
    for target in _targets(address):
        with _client(context, target) as client:
            done = client.switch(scorer, model, allow_other_tokenizer=allow_other_tokenizer)
        out().print(f"{scorer} points to {done.model.name}, before to {done.previous}")


@app.command()
def unload(
    context: typer.Context,
    model: ModelName,
    address: RewardAddress = DEFAULT_ADDRESSES["reward"],
    timeout: Timeout = None,
) -> None:
    """Unload a model after its last item, or forget one that failed to load."""
    for target in _targets(address):
        with _client(context, target) as client:
            client.unload(model, timeout=timeout)
        out().print(f"{model} is unloaded")


@app.command()
def normalize(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="JSONL with prompt and response in each row; - is stdin.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; beside the model, as named here.")
    ] = Path("reward_normalization.json"),
    reference: Annotated[str, typer.Option(help="What the rows are, for people who read the file.")] = "",
    scorer: Annotated[str, typer.Option(help="Name of the scorer. Default: the server's.")] = "",
    address: RewardAddress = DEFAULT_ADDRESSES["reward"],
    timeout: Timeout = None,
) -> None:
    """Fit the normalisation of a model on a reference set: mean 0 and standard deviation 1 of its raw scores there.

    A server applies the file that lies beside a model when it loads it. Every row must have a score.
    """
    from steersman.cli import jsonl
    from steersman.cli.score import item_of
    from steersman.client.reward import RewardClient

    items = [item_of(row, f"{source}: row {number}") for number, row in enumerate(jsonl.read(source), start=1)]
    with RewardClient(address, credentials=credentials_of(context)) as client:
        scores = client.score(items, scorer=scorer, include_raw=True, timeout=timeout)
    for number, score in enumerate(scores, start=1):
        if score.error is not None:
            raise CommandError(f"{source}: row {number} has no score: {score.error}")
    raw = [score.raw for score in scores if score.raw is not None]
    models = {(score.model, score.revision) for score in scores}
    if len(raw) < len(scores) or len(models) > 1:
        raise CommandError("scores came from an ensemble or from several models, allowed: one model or function")
    mean, std = _moments(raw)
    values = {
        "version": 1,
        "mean": mean,
        "std": std,
        "num_responses": len(raw),
        "reference": reference or source.name,
        "scored_by": next(iter(models))[1],
    }
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(output)
    err().print(f"mean {mean:.6g}, standard deviation {std:.6g} of {len(raw)} responses, in {output}")


@app.command()
def check(
    context: typer.Context,
    run: Annotated[
        Path, typer.Argument(help="Run folder of a reward_model job, or its scores.json.", metavar="RUN_OR_FILE")
    ],
    scorer: Annotated[str, typer.Option(help="Name of the scorer or model. Default: the server's.")] = "",
    tolerance: Annotated[
        float | None,
        typer.Option(min=1e-12, help="Largest difference. Default: 1e-3 in float32, 0.02 float16, 0.1 bfloat16."),
    ] = None,
    address: RewardAddress = DEFAULT_ADDRESSES["reward"],
    timeout: Timeout = None,
) -> None:
    """Check that a server gives the raw scores that training ended with. The exit status is 1 if it does not.

    Finds a wrong model, tokenizer, head or dtype. A score above 1 may be off by that share of itself.
    """
    from steersman.cli import reward_check
    from steersman.client.reward import RewardClient

    expected = reward_check.read(run)
    bad = []
    for target in _targets(address):
        with RewardClient(target, credentials=credentials_of(context)) as client, _client(context, target) as models:
            found = reward_check.compare(client, models, expected, scorer=scorer, tolerance=tolerance, timeout=timeout)
        out().print(
            f"{target}: {found.model} ({found.dtype}, {found.revision}): the largest difference of "
            f"{len(expected.items)} scores is {found.difference:.3g}, at items[{found.item}]; "
            f"allowed: {found.tolerance:g}"
        )
        if not found.is_good:
            bad.append(target)
    if bad:
        raise CommandError(f"scores are not those of the training at {', '.join(bad)}")


def _moments(values: list[float]) -> tuple[float, float]:
    """Mean and population standard deviation. CommandError if the values give no scale."""
    mean = math.fsum(values) / len(values) if values else 0.0
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) if values else 0.0
    if std <= 0:
        raise CommandError(f"{len(values)} scores, all the same, give no scale; allowed: at least 2 different ones")
    return mean, std


def _targets(address: str) -> list[str]:
    """The servers of an address, to be asked one by one. Only a plain list can be taken apart."""
    return [part.strip() for part in address.split(",")]


def _client(context: typer.Context, target: str) -> Any:
    from steersman.client.reward_models import RewardModelClient

    return RewardModelClient(target, credentials=credentials_of(context))


def _as_dict(target: str, model: Any) -> dict[str, Any]:
    return {
        "address": target,
        "name": model.name,
        "state": str(model.state),
        "scorers": list(model.scorers),
        "source": model.source,
        "revision": model.model.revision if model.model is not None else "",
        "parameter_bytes": model.parameter_bytes,
        "num_items_in_flight": model.num_items_in_flight,
        "error": model.error,
    }
