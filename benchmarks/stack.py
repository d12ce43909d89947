"""The services as real processes, on free ports, with their logs in files."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from steersman.cli.supervisor import ServiceSpec, Supervisor, free_port

START_SECONDS = 180.0
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Service:
    """One server: its settings as in its YAML file, and variables of its environment. `program`: which one, where its
    name does not say so (several of a kind).
    """

    name: str
    settings: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    program: str = ""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Services that serve: `addresses` and process ids by name."""

    addresses: Mapping[str, str]
    pids: Mapping[str, int]

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time that each service has used since its start, with its child processes, ended ones too."""
        return {name: round(_cpu_seconds(pid), 2) for name, pid in self.pids.items()}


@contextmanager
def running(services: Sequence[Service], directory: Path) -> Iterator[Running]:
    """Starts the services; all serve inside the block, and have ended after it. Their files go to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    specs = []
    for service in services:
        port = free_port()
        path = directory / f"{service.name}.yaml"
        settings = {"host": "127.0.0.1", "port": port, "metrics_port": None, **service.settings}
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        arguments = ["--config", str(path)]
        specs.append(
            ServiceSpec.of(
                service.program or service.name,
                arguments,
                address=f"127.0.0.1:{port}",
                name=service.name,
                environment=service.environment,
            )
        )
    with ExitStack() as stack:
        logs = {
            service.name: stack.enter_context((directory / f"{service.name}.log").open("a", encoding="utf-8"))
            for service in services
        }

        def write_line(name: str, line: str) -> None:
            logs[name].write(line + "\n")
            logs[name].flush()

        supervisor = Supervisor(specs, on_line=write_line, start_timeout=START_SECONDS)
        with supervisor:
            yield Running(
                addresses={spec.name: spec.address for spec in specs},
                pids={spec.name: supervisor[spec.name].pid for spec in specs},
            )


def thread_environment(num_threads: int) -> dict[str, str]:
    """For a process that shares the machine with others: so many threads, which sleep when they wait."""
    return {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}


def tail(path: Path, num_lines: int = 20) -> str:
    """The last lines of a log file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    return "".join(lines[-num_lines:])


def _cpu_seconds(pid: int) -> float:
    try:
        process = psutil.Process(pid)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    except psutil.Error:
        return 0.0
    ended = times[0].children_user + times[0].children_system
    return float(ended + sum(each.user + each.system for each in times))
