"""The policy service, with places where a test can stop it or take its memory away.

A gate is shut while the folder in STEERSMAN_TEST_GATES holds NAME.shut; NAME.entered then says that the service stands
there. The gates:

    generate    a prompt has come
    receive     a chunk has been written to the staging copy
    stage       some of the weights have been loaded into the engine, others not
    activate    the engine holds the new weights, and has not been told what they are called
    starve      no gate: while it is shut the engine is refused memory when it makes room for new weights
"""

import asyncio
import contextlib
import os
import resource
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from steersman.policy import app
from steersman.policy.engine.options import prepare_environment
from steersman.policy.settings import PolicySettings
from steersman.policy.weights.store import WeightStore
from steersman.serving import app as serving
from steersman.serving.location import locate
from steersman.serving.metrics import Metrics
from steersman.serving.vllm_environment import runs_on_cpu
from steersman.wire.allocator import keep_freed_memory

GATES = Path(os.environ["STEERSMAN_TEST_GATES"])
_HOG_BYTES = 16 * 1024
"""Smaller than any matrix of the model."""


async def gate(name: str) -> None:
    """Waits while the gate is shut."""
    shut = GATES / f"{name}.shut"
    if shut.exists():
        (GATES / f"{name}.entered").touch()
        while shut.exists():
            await asyncio.sleep(0.02)


def install() -> None:
    """Puts the gates in. Before the engine is started: its process is a fork of this one."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from steersman.policy.engine.shadow import ShadowModel
    from steersman.policy.engine.vllm_engine import VllmEngine

    write, update, name_version = WeightStore.write, VllmEngine._update, AsyncLLM.update_weight_version
    make_room, generate = ShadowModel.open, VllmEngine.generate

    async def gated_write(self: WeightStore, *arguments: Any) -> None:
        await write(self, *arguments)
        await gate("receive")

    async def gated_update(self: VllmEngine, **step: Any) -> None:
        await update(self, **step)
        if step["action"] == "load":
            await gate("stage")

    async def gated_name_version(self: AsyncLLM, version: str) -> Any:
        await gate("activate")
        return await name_version(self, version)

    async def gated_generate(self: VllmEngine, request: Any) -> AsyncGenerator[Any, None]:
        await gate("generate")
        async with contextlib.aclosing(generate(self, request)) as samples:
            async for sample in samples:
                yield sample

    def starved_make_room(self: ShadowModel) -> None:
        if not (GATES / "starve.shut").exists():
            make_room(self)
            return
        (GATES / "starve.entered").touch()
        with Famine():
            make_room(self)

    WeightStore.write = gated_write  # type: ignore[method-assign]
    VllmEngine._update = gated_update  # type: ignore[method-assign]
    AsyncLLM.update_weight_version = gated_name_version  # type: ignore[method-assign]
    VllmEngine.generate = gated_generate  # type: ignore[method-assign]
    ShadowModel.open = starved_make_room  # type: ignore[method-assign]


class Famine:
    """The address space grows no further, and the allocator has nothing left."""

    def __enter__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), self._limits[1]))
        self._hog: list[bytearray] = []
        try:
            while True:
                self._hog.append(bytearray(_HOG_BYTES))
        except MemoryError:
            pass

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._limits)
        self._hog.clear()


async def build(settings: PolicySettings, metrics: Metrics) -> app.PolicyService:
    """As the service's own, with gates."""
    on_cpu = runs_on_cpu()
    prepare_environment(settings.engine_options(locate("model", settings.model), on_cpu=on_cpu), on_cpu=on_cpu)
    install()
    return await app.build(settings, metrics)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(serving.main("policy", PolicySettings, build))
