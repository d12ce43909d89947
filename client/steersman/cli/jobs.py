"""`steersman jobs`: training jobs of a trainer service."""

from typing import Annotated

import typer

from steersman.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, credentials_of
from steersman.cli.console import CleanGroup, out, write
from steersman.client.types import JobState

app = typer.Typer(cls=CleanGroup, no_args_is_help=True, help="Training jobs: list, get, cancel, resume, watch.")

JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]


@app.command("list")
def list_jobs(
    context: typer.Context,
    state: Annotated[list[JobState] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    address: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """List jobs, newest first."""
    from steersman.cli.job_view import jobs_table
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        out().print(jobs_table(client.list_jobs(states=state or [])))


@app.command("get")
def get_job(context: typer.Context, job: JobId, address: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """Show a job as JSON."""
    from steersman.cli.train import job_json
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        write(job_json(client.get_job(job)) + "\n")


@app.command("cancel")
def cancel_job(context: typer.Context, job: JobId, address: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """Ask a job to write a checkpoint and stop."""
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        out().print(f"{job} is {client.cancel_job(job).state}")


@app.command("resume")
def resume_job(
    context: typer.Context,
    job: JobId,
    address: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
    follow: Annotated[bool, typer.Option(help="Watch the job to its end.")] = False,
) -> None:
    """Start a failed or cancelled job again from its last checkpoint."""
    from steersman.cli import train as implementation
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        resumed = client.resume_job(job)
        out().print(f"{job} is {resumed.state}")
        if follow:
            implementation.follow(client, resumed)


@app.command("watch")
def watch_job(
    context: typer.Context,
    job: JobId,
    after_sequence: Annotated[int, typer.Option(min=0, help="Only events after this one.")] = 0,
    address: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Watch a job to its end; the exit status is 1 if it does not succeed."""
    from steersman.cli import train as implementation
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        implementation.follow(client, client.get_job(job), after_sequence)
