"""`steersman train` and `steersman jobs`: submit, watch, list, cancel, resume."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
import yaml

from steersman.cli import cluster, console, yaml_file
from steersman.cli.job_view import JobView
from steersman.client.channel import Credentials
from steersman.client.trainer import TrainerClient
from steersman.client.types import Job, JobKind, JobResources, JobState
from steersman.wire.errors import SteersmanError


def read_config(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of a YAML file with `a.b=value` set on top; values are YAML. InputError for what cannot be read."""
    config = yaml_file.read(path)
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise console.InputError(f"{path}: is a {type(config).__name__}, allowed: a mapping of settings")
    for override in overrides:
        apply_override(config, override)
    return config


def apply_override(config: dict[str, Any], override: str) -> None:
    """Sets one `a.b=value` in place."""
    path, separator, text = override.partition("=")
    *parents, last = path.split(".")
    if not separator or not all([*parents, last]):
        raise console.InputError(f"--set is {override!r}, allowed: key=value or outer.inner=value")
    for depth, parent in enumerate(parents, start=1):
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise console.InputError(f"--set {override}: {'.'.join(parents[:depth])} is a value, not a group")
    try:
        config[last] = yaml_file.parse(text)
    except yaml.YAMLError:
        raise console.InputError(f"--set {override}: {text!r} is not a YAML value") from None


@dataclass(frozen=True, kw_only=True)
class How:
    """What is to become of a job that is submitted."""

    validate_only: bool
    dry_run: bool
    follow: bool


def resources_of(
    *, nodes: int, processes: int, gpus: int, cpus: float, memory_gib: float, queue: str, image: str
) -> JobResources:
    """The resources of a job, from what is asked for each node. InputError if GPUs and processes do not match."""
    on_one_node = processes or max(1, gpus)
    if gpus not in (0, on_one_node):
        raise console.InputError(f"--gpus is {gpus} and --processes {processes}, allowed: as many, or none")
    return JobResources(
        num_processes=nodes * on_one_node,
        processes_per_node=on_one_node,
        gpus_per_process=1 if gpus else 0,
        cpus_per_process=cpus / on_one_node,
        memory_bytes_per_process=int(memory_gib * 2**30) // on_one_node,
        queue_name=queue,
        image=image,
    )


def submit(
    address: str,
    credentials: Credentials | None,
    kind: JobKind,
    config: Mapping[str, Any],
    resources: JobResources,
    job_id: str | None,
    how: How,
) -> None:
    """Submits a job to a trainer service."""
    with TrainerClient(address, credentials=credentials) as client:
        if how.dry_run:
            objects = client.preview_job(kind, config, job_id=job_id, resources=resources)
            console.err().print("the settings are good; nothing was started")
            console.write(objects)
            return
        job = client.create_job(kind, config, job_id=job_id, resources=resources, validate_only=how.validate_only)
        if how.validate_only:
            console.err().print("the settings are good; nothing was started")
            return
        console.err().print(f"job {job.id} was accepted")
        if how.follow:
            follow(client, job)
        else:
            console.write(job.id + "\n")


def submit_to_cluster(
    target: cluster.Target,
    kind: JobKind,
    config: Mapping[str, Any],
    resources: JobResources,
    job_id: str | None,
    how: How,
) -> None:
    """Makes the objects of a job in a cluster."""
    from steersman.cli.cluster_jobs import job_objects, new_job_id
    from steersman.cluster import resources as cluster_resources

    settings = cluster.settings_of(target)
    checked = cluster.check_settings(kind, config)
    wanted = cluster_resources.JobResources(**asdict(resources))
    job_id = job_id or new_job_id(kind)
    if how.dry_run or how.validate_only:
        namespace = cluster.namespace_of(target, target.values())
        objects = job_objects(job_id, kind, config, wanted, settings, namespace=namespace)
        console.err().print(f"{'the settings are good; ' if checked else ''}nothing was started")
        if how.dry_run:
            console.write(yaml.safe_dump_all(objects, sort_keys=False))
        return
    with cluster.open_jobs(target) as jobs:
        objects = job_objects(job_id, kind, config, wanted, settings, namespace=jobs.namespace)
        job = jobs.create(objects).job()
        console.err().print(f"job {job.id} was made in namespace {jobs.namespace}: {objects[0]['metadata']['name']}")
        if how.follow:
            cluster.follow(jobs, job)
        else:
            console.write(job.id + "\n")


def follow(client: TrainerClient, job: Job, after_sequence: int = 0) -> None:
    """Watches a job to its end. Ctrl-C leaves the job running. Exit status 1 if the job did not succeed."""
    output = console.out()
    view = JobView(job, output)

    def lost(error: SteersmanError) -> None:
        view.note(f"lost the trainer service ({error.code.name}); trying again")

    try:
        view.show(client.watch_job(job.id, after_sequence=after_sequence, on_disconnect=lost))
    except KeyboardInterrupt:
        console.err().print(f"The job goes on. Watch it again with: steersman jobs watch {job.id}")
        raise typer.Exit(130) from None
    ended = client.get_job(job.id)
    if ended.state is not JobState.SUCCEEDED:
        raise console.CommandError(f"job {ended.id} is {ended.state}" + (f": {ended.error}" if ended.error else ""))
    output.print(f"{ended.id} succeeded. Its run folder: {ended.run_directory}")


def job_json(job: Job) -> str:
    """A job as indented JSON."""

    def plain(value: object) -> str:
        if isinstance(value, datetime):
            return value.isoformat()
        raise TypeError(f"{type(value).__name__} is not JSON")

    return json.dumps(asdict(job), indent=2, default=plain)
