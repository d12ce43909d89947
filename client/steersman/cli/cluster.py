"""`--on kubernetes`: where the cluster is, and what its pods look like; options and what becomes of them."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from steersman.cli import console
from steersman.client.types import Job, JobKind, JobState
from steersman.wire.errors import FieldViolation, Reason, SteersmanError

DEFAULT_INSTANCE: Final = "steersman"
_DEFAULT_REQUEST_SECONDS: Final = 20.0
_CHECK_SECONDS: Final = 120.0


class Where(StrEnum):
    """Who keeps jobs."""

    SERVICE = "service"
    KUBERNETES = "kubernetes"


On = Annotated[
    Where,
    typer.Option(
        "--on",
        envvar="STEERSMAN_ON",
        help="The trainer service at --address, or a cluster itself, by the kubeconfig and without that service.",
    ),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option(
        "--cluster",
        envvar="STEERSMAN_CLUSTER",
        exists=True,
        dir_okay=False,
        help="YAML file of what pods look like, the settings under `kubernetes` of the trainer service.",
    ),
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace. Default: the cluster file's, or the context's.")
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig. Default: the current one.")]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The options that say where a cluster is."""

    file: Path | None = None
    namespace: str | None = None
    context: str | None = None

    def values(self) -> dict[str, Any]:
        """What the cluster file says; empty without one. InputError for what is no mapping."""
        from steersman.cli import yaml_file

        values = {} if self.file is None else yaml_file.read(self.file)
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise console.InputError(f"{self.file}: is a {type(values).__name__}, allowed: a mapping of settings")
        return values


def settings_of(target: Target) -> Any:
    """`KubernetesSettings` of the cluster file. InputError names each setting that cannot be."""
    from pydantic import ValidationError

    from steersman.cluster.settings import KubernetesSettings

    if target.file is None:
        raise console.InputError(
            "--on kubernetes needs --cluster FILE, with `image` and `run_claim` at least; see docs/kubernetes-jobs.md"
        )
    try:
        return KubernetesSettings(**target.values())
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise console.InputError(f"{target.file}: bad settings\n" + "\n".join(lines)) from None
    except TypeError as error:
        raise console.InputError(f"{target.file}: {error}") from None


@contextmanager
def explained(namespace: str) -> Iterator[None]:
    """Failures of the API server as one message: which object, why, and what to do."""
    from steersman.cluster.explain import explain_problem
    from steersman.cluster.problem import ApiProblem

    try:
        yield
    except ApiProblem as problem:
        raise console.CommandError(explain_problem(problem, namespace=namespace)) from None


@contextmanager
def open_jobs(target: Target) -> "Iterator[Any]":
    """The `ClusterJobs` of a cluster, with its failures explained."""
    from steersman.cli.cluster_jobs import ClusterJobs

    values = target.values()
    api = _connect(target, values)
    try:
        with explained(api.namespace):
            yield ClusterJobs(api, instance=str(values.get("instance", DEFAULT_INSTANCE)))
    finally:
        api.close()


def namespace_of(target: Target, values: Mapping[str, Any]) -> str:
    """Where objects would go; `default` where no kubeconfig says."""
    if given := target.namespace or values.get("namespace"):
        return str(given)
    try:
        api = _connect(target, values)
    except console.CommandError as error:
        console.err().print(f"the namespace is a guess: {error}", markup=False)
        return "default"
    api.close()
    return str(api.namespace)


def _connect(target: Target, values: Mapping[str, Any]) -> Any:
    from steersman.cluster.problem import NoCluster

    try:
        from steersman.cluster.api import connect  # needs an optional package
    except ImportError as error:
        message = f"--on kubernetes needs the package kubernetes ({error}): pip install 'steersman[kubernetes]'"
        raise console.CommandError(message) from None
    seconds = float(values.get("request_seconds", _DEFAULT_REQUEST_SECONDS))
    try:
        return connect(target.namespace or values.get("namespace"), seconds, context=target.context)
    except NoCluster as error:
        raise console.CommandError(str(error)) from None


def check_settings(kind: JobKind, config: Mapping[str, Any]) -> bool:
    """Checks the settings of a job as the trainer service would. INVALID_FIELD names each bad one; False if that cannot
    be done here.

    The trainer is another room, and may need packages that are not here: then the worker checks, when it starts.
    """
    command = [sys.executable, "-P", "-m", "steersman.trainer.jobs.check"]
    text = json.dumps({"kind": str(kind), "config": dict(config)})
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=_CHECK_SECONDS)
    if done.returncode != 0:
        why = done.stderr.strip().rpartition("\n")[2]
        console.err().print(f"the settings are checked by the worker only: {why}", markup=False)
        return False
    violations = [FieldViolation(field=field, description=text) for field, text in json.loads(done.stdout)]
    if violations:
        message = f"{len(violations)} bad settings"
        raise SteersmanError(Reason.INVALID_FIELD, message, violations=violations)
    return True


def follow(jobs: Any, job: Job) -> None:
    """Watches a job to its end. Ctrl-C leaves it running. Exit status 1 if it did not succeed."""
    from steersman.cli.cluster_watch import Watcher
    from steersman.cli.job_view import JobView

    output = console.out()
    view = JobView(job, output)
    try:
        view.show(Watcher(jobs, job.id, note=view.note).events())
    except KeyboardInterrupt:
        console.err().print(f"The job goes on. Watch it again with: steersman jobs watch {job.id} --on kubernetes")
        raise typer.Exit(130) from None
    if view.state is not JobState.SUCCEEDED:
        raise console.CommandError(f"job {job.id} is {view.state}" + (f": {view.error}" if view.error else ""))
    output.print(f"{job.id} succeeded. Its run folder: {job.run_directory} of the runs volume")
