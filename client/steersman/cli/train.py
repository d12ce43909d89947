"""`steersman train` and `steersman jobs`: submit, watch, list, cancel, resume."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
import yaml

from steersman.cli import console, yaml_file
from steersman.cli.job_view import JobView
from steersman.client.trainer import TrainerClient
from steersman.client.types import Job, JobState
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
