"""TrainerService as the serving runtime runs it."""

import os
from collections.abc import Sequence

import grpc

from steersman.serving.metrics import Metrics
from steersman.trainer.jobs.handler import JobsHandler
from steersman.trainer.jobs.launcher import Launcher, LocalLauncher
from steersman.trainer.jobs.metrics import JobCollector
from steersman.trainer.jobs.servicer import TrainerServicer
from steersman.trainer.jobs.settings import TrainerSettings
from steersman.trainer.jobs.validation import SettingsValidator, Validator
from steersman.v1 import trainer_pb2, trainer_pb2_grpc


class TrainerServer:
    """The `Service` of steersman.serving over the jobs handler."""

    name = "trainer"

    def __init__(self, handler: JobsHandler, metrics: Metrics) -> None:
        self._handler = handler
        self._jobs = metrics.gauge("jobs", "Jobs that have not ended.", ("state",))
        metrics.collect(JobCollector(handler.readings))

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Adds the servicer."""
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(TrainerServicer(self._handler), server)  # type: ignore[no-untyped-call]
        return [trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name]

    async def check_health(self) -> None:
        """Raises if the database does not answer."""
        for state, count in (await self._handler.count_by_state()).items():
            self._jobs.labels(state=str(state)).set(count)

    async def drain(self) -> None:
        """Ends the watches."""
        await self._handler.drain()

    async def close(self) -> None:
        """Closes the database; jobs go on."""
        await self._handler.close()


async def build(
    settings: TrainerSettings,
    metrics: Metrics,
    *,
    launcher: Launcher | None = None,
    validator: Validator | None = None,
) -> TrainerServer:
    """The service with its handler started: jobs of an earlier service are adopted before the first call."""
    handler = JobsHandler(
        settings.runs_directory,
        launcher=launcher or make_launcher(settings),
        validator=validator or SettingsValidator(),
        max_running_jobs=settings.max_running_jobs,
        cancel_grace_seconds=settings.cancel_grace_seconds,
        max_attempts=settings.max_attempts,
        # Pods are on several machines, which share no memory.
        journal="wal" if settings.launcher == "local" else "delete",
    )
    await handler.start()
    return TrainerServer(handler, metrics)


def make_launcher(settings: TrainerSettings) -> Launcher:
    """The launcher of the settings. ValueError if it cannot be made here."""
    cluster = settings.kubernetes
    if settings.launcher == "local" or cluster is None:
        return LocalLauncher()
    try:
        from steersman.cluster.api import connect  # needs an optional package
    except ImportError as error:
        raise ValueError(f"launcher kubernetes needs the package kubernetes ({error})") from None
    from steersman.cluster.problem import NoCluster
    from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher

    runs = settings.runs_directory.resolve()
    if cluster.run_mount_path is not None and not runs.is_relative_to(cluster.run_mount_path):
        raise ValueError(f"kubernetes.run_mount_path is {cluster.run_mount_path}, allowed: {runs} or a folder above it")
    user, group = os.getuid(), os.getgid()
    for name, given, own in (
        ("run_as_user", cluster.run_as_user, user),
        ("run_as_group", cluster.run_as_group, group),
    ):
        if given is None and own == 0:
            raise ValueError(f"kubernetes.{name} is none, and this service runs as root; allowed: an id of 1 or more")
    try:
        api = connect(cluster.namespace, cluster.request_seconds)
    except NoCluster as error:
        raise ValueError(str(error)) from error
    return KubernetesLauncher(cluster, api, user=user, group=group)
