"""Launchers and their jobs, and what to wait for."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import WorkerStatus
from steersman.trainer.jobs.model import JobResources

ONE, TWO = "steersman-one-1", "steersman-one-2"
SEVERAL = JobResources(num_processes=4, processes_per_node=2)

Make = Callable[..., KubernetesLauncher]
Runs = Callable[..., Path]
SignIn = Callable[[str], None]


async def launch(launcher: KubernetesLauncher, run: Path) -> str:
    return await launcher.launch(run, JobResources())


async def until(launcher: KubernetesLauncher, handle: str, wanted: Callable[[WorkerStatus], bool]) -> WorkerStatus:
    """What the launcher says once it says what is wanted."""
    async with asyncio.timeout(120):
        while not wanted(status := await launcher.status(handle)):
            await asyncio.sleep(0.05)
    return status


async def waiting_for(launcher: KubernetesLauncher, handle: str, text: str) -> str:
    """Why a worker waits, once that holds a text."""
    status = await until(launcher, handle, lambda now: text in now.waiting or not now.alive)
    assert status.alive, status.ending
    return status.waiting


def assert_holds(made: Any, asked: Any, at: str = "") -> None:
    """What was asked for is in what was made, beside what the API server adds."""
    match asked:
        case dict():
            for key, value in asked.items():
                assert_holds(made[key], value, f"{at}.{key}")
        case list():
            assert len(made) == len(asked), at
            for index, (one, other) in enumerate(zip(made, asked, strict=True)):
                assert_holds(one, other, f"{at}[{index}]")
        case str() if re.search(r"\.(limits|requests)\.|sizeLimit", at):
            assert parse_quantity(made) == parse_quantity(asked), at
        case _:
            assert made == asked, at
