"""The services of a pipeline as local processes, and jobs through the trainer service."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from examples.steps.console import Console
from steersman.cli.supervisor import ServiceSpec, Supervisor, describe_exit, free_port
from steersman.client import (
    Job,
    JobKind,
    JobProgress,
    JobResources,
    JobState,
    SteersmanError,
    StepMetrics,
    TrainerClient,
)

LINE_SECONDS: Final = 3.0
CANCEL_SECONDS: Final = 60.0


class JobFailed(Exception):
    """A job did not succeed."""


class Stack:
    """Services started one after the other, all ended at the end of the `with` block."""

    def __init__(self, console: Console, logs: Path) -> None:
        self._console = console
        self._logs = logs
        self._exit = ExitStack()
        self._supervisors: list[Supervisor] = []
        self.addresses: dict[str, str] = {}

    def __enter__(self) -> "Stack":
        self._logs.mkdir(parents=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()

    def start(self, *services: str, settings: Mapping[str, Mapping[str, Any]], threads: int = 1) -> None:
        """Starts services side by side, and returns once all are healthy. StartError says which is not, and why."""
        specs = []
        for service in services:
            address = f"127.0.0.1:{free_port()}"
            flags: dict[str, Any] = {"port": address.rpartition(":")[2], "metrics_port": 0, **settings.get(service, {})}
            arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
            environment = {"OMP_NUM_THREADS": str(threads)}
            specs.append(ServiceSpec.of(service, arguments, address=address, environment=environment))
            self.addresses[service] = address
        logs = {
            service: self._exit.enter_context((self._logs / f"{service}.log").open("a", encoding="utf-8"))
            for service in services
        }

        def record(service: str, line: str) -> None:
            logs[service].write(line + "\n")
            logs[service].flush()

        started = time.monotonic()
        supervisor = Supervisor(specs, on_line=record)
        self._supervisors.append(supervisor)
        self._exit.callback(supervisor.stop)
        supervisor.start(
            on_ready=lambda name: self._console.say(
                f"{name} serves at {self.addresses[name]} after {time.monotonic() - started:.1f} s"
            )
        )

    def ended(self) -> list[str]:
        """Services that ended by themselves, for the explanation of a failure."""
        processes = (process for supervisor in self._supervisors for process in supervisor.processes.values())
        return [
            f"{process.spec.name} {describe_exit(process.exit_code)}, its log: {self._logs}/{process.spec.name}.log"
            for process in processes
            if process.exit_code is not None
        ]

    def run_job(self, kind: JobKind, config: Mapping[str, Any], *, cpus: int) -> Path:
        """Runs a job to its end; gives its run folder. Cancels it if this is interrupted. JobFailed says why not."""
        resources = JobResources(cpus_per_process=cpus)
        with TrainerClient(self.addresses["trainer"]) as trainer:
            job = trainer.create_job(kind, config, job_id=kind.replace("_", "-"), resources=resources)
            try:
                self._watch(trainer, job)
            except BaseException:
                self._console.say(f"stopping job {job.id}")
                self._cancel(trainer, job.id)
                raise
            job = trainer.get_job(job.id)
        if job.state is not JobState.SUCCEEDED:
            raise JobFailed(f"job {job.id} {job.state}: {job.error}\n  its log: {job.run_directory}/log.txt")
        return Path(job.run_directory)

    def _watch(self, trainer: TrainerClient, job: Job) -> None:
        last_line, last_text = 0.0, ""
        progress = JobProgress(step=0, total_steps=0)
        shown: Mapping[str, float] = {}
        for event in trainer.watch_job(job.id):
            match event.event:
                case JobProgress() as progress:
                    pass
                case StepMetrics(values=shown):
                    continue
            text = _progress_line(progress, shown)
            if text != last_text and time.monotonic() - last_line >= LINE_SECONDS:
                self._console.say(text)
                last_line, last_text = time.monotonic(), text

    def _cancel(self, trainer: TrainerClient, job_id: str) -> None:
        try:
            trainer.cancel_job(job_id)
            deadline = time.monotonic() + CANCEL_SECONDS
            while not trainer.get_job(job_id).state.is_terminal and time.monotonic() < deadline:
                time.sleep(0.1)
        except SteersmanError:
            # It has ended already, or the service is gone with its process group.
            return


_SHOWN: Final = {
    "loss": "loss",
    "accuracy": "accuracy",
    "objective/scores": "reward",
    "objective/kl": "KL",
    "rollout/response_length_mean": "length",
    "eps": "samples/s",
}


def _progress_line(progress: JobProgress, metrics: Mapping[str, float]) -> str:
    steps = f"step {progress.step:>4}/{progress.total_steps}" if progress.total_steps else ""
    numbers = "  ".join(f"{label} {metrics[name]:.3g}" for name, label in _SHOWN.items() if name in metrics)
    return "  ".join(part for part in (steps, numbers or progress.message) if part)
