"""`steersman jobs`: training jobs of a trainer service, or of a cluster."""

from collections.abc import Iterable
from typing import Annotated

import typer

from steersman.cli.cluster import ClusterFile, Context, Namespace, On, Target, Where
from steersman.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, credentials_of
from steersman.cli.console import CleanGroup, CommandError, err, out, write
from steersman.client.types import JobState

app = typer.Typer(
    cls=CleanGroup,
    no_args_is_help=True,
    help="Training jobs: list, get, watch, logs, cancel, resume; with --on kubernetes those that the command made in a "
    "cluster by itself.",
)

JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]
Address = TrainerAddress
_SERVICE = DEFAULT_ADDRESSES["trainer"]


@app.command("list")
def list_jobs(
    context: typer.Context,
    state: Annotated[list[JobState] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    address: Address = _SERVICE,
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
) -> None:
    """List jobs, newest first."""
    from steersman.cli.job_view import jobs_table

    if on is Where.KUBERNETES:
        from steersman.cli.cluster import open_jobs

        with open_jobs(Target(file=cluster_file, namespace=namespace, context=cluster_context)) as cluster:
            found = [one.job() for one in cluster.newest()]
        out().print(jobs_table(job for job in found if not state or job.state in state))
        return
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        out().print(jobs_table(client.list_jobs(states=state or [])))


@app.command("get")
def get_job(
    context: typer.Context,
    job: JobId,
    address: Address = _SERVICE,
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
) -> None:
    """Show a job as JSON."""
    from steersman.cli.train import job_json

    if on is Where.KUBERNETES:
        from steersman.cli.cluster import open_jobs

        with open_jobs(Target(file=cluster_file, namespace=namespace, context=cluster_context)) as cluster:
            write(job_json(cluster.get(job).job()) + "\n")
        return
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        write(job_json(client.get_job(job)) + "\n")


@app.command("cancel")
def cancel_job(
    context: typer.Context,
    job: JobId,
    address: Address = _SERVICE,
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
) -> None:
    """Ask a job to write a checkpoint and stop."""
    if on is Where.KUBERNETES:
        from steersman.cli.cluster import open_jobs

        with open_jobs(Target(file=cluster_file, namespace=namespace, context=cluster_context)) as cluster:
            out().print(f"{job} is {cluster.cancel(job).state}")
        return
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        out().print(f"{job} is {client.cancel_job(job).state}")


@app.command("resume")
def resume_job(
    context: typer.Context,
    job: JobId,
    address: Address = _SERVICE,
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
    follow: Annotated[bool, typer.Option(help="Watch the job to its end.")] = False,
) -> None:
    """Start a failed or cancelled job again from its last checkpoint."""
    if on is Where.KUBERNETES:
        from steersman.cli import cluster as cluster_jobs

        with cluster_jobs.open_jobs(Target(file=cluster_file, namespace=namespace, context=cluster_context)) as cluster:
            begun = cluster.resume(job).job()
            out().print(f"{job} is {begun.state}")
            if follow:
                cluster_jobs.follow(cluster, begun)
        return
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
    after_sequence: Annotated[int, typer.Option(min=0, help="Only events after this one, of a service.")] = 0,
    address: Address = _SERVICE,
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
) -> None:
    """Watch a job to its end; the exit status is 1 if it does not succeed."""
    if on is Where.KUBERNETES:
        from steersman.cli import cluster as cluster_jobs

        with cluster_jobs.open_jobs(Target(file=cluster_file, namespace=namespace, context=cluster_context)) as cluster:
            cluster_jobs.follow(cluster, cluster.get(job).job())
        return
    from steersman.cli import train as implementation
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        implementation.follow(client, client.get_job(job), after_sequence)


@app.command("logs")
def job_logs(
    context: typer.Context,
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Only so many of the last lines.")] = None,
    node: Annotated[int, typer.Option(min=0, help="Which node of the job, where it has several.")] = 0,
    address: Address = _SERVICE,
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
) -> None:
    """Show what the worker of a job has printed."""
    if on is Where.KUBERNETES:
        from steersman.cli.cluster import open_jobs
        from steersman.cli.cluster_watch import Watcher

        with open_jobs(Target(file=cluster_file, namespace=namespace, context=cluster_context)) as cluster:
            cluster.get(job)  # what is wrong from the beginning is said, not waited for
            watcher = Watcher(cluster, job, note=lambda message: err().print(message, markup=False))
            lines = watcher.log(node=node, follow=follow, tail_lines=tail)
            _write_lines(lines)
        return
    from steersman.client.trainer import TrainerClient

    with TrainerClient(address, credentials=credentials_of(context)) as client:
        _write_lines(client.job_logs(job, follow=follow, tail_lines=tail, node=node))


@app.command("delete")
def delete_job(
    job: JobId,
    on: On = Where.SERVICE,
    cluster_file: ClusterFile = None,
    namespace: Namespace = None,
    cluster_context: Context = None,
) -> None:
    """Delete the objects of a job of a cluster; what runs writes a checkpoint first. Its run folder stays."""
    if on is not Where.KUBERNETES:
        raise CommandError("a trainer service keeps its jobs; cancel this one, or delete one --on kubernetes")
    from steersman.cli.cluster import open_jobs

    with open_jobs(Target(file=cluster_file, namespace=namespace, context=cluster_context)) as cluster:
        count = cluster.delete(job)
    out().print(f"{job} is being deleted: {count} {'attempt' if count == 1 else 'attempts'}")


def _write_lines(lines: Iterable[str]) -> None:
    try:
        for line in lines:
            write(line + "\n")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
