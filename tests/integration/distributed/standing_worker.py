"""A worker with a stage of which rank 1 stands still: it is stopped, or sleeps."""

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from steersman.trainer.jobs import worker
from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import Stage

if TYPE_CHECKING:
    from steersman.trainer.distributed.world import World
    from steersman.trainer.stages.run import Run


class Config(BaseModel, extra="forbid"):
    """How it stands still, and after how many seconds that is noticed."""

    how: Literal["stopped", "asleep"]
    patience: float


def stand_still(config: Config, run: "Run") -> None:
    """Never ends well."""
    run.world.watch(config.patience)
    run.world.barrier()
    forward(run.world)
    run.progress(3, 9, "updating")
    if run.world.rank == 1:
        while b"updating" not in run.world._store.get("steersman/sign/1"):  # type: ignore[attr-defined]
            threading.Event().wait(0.05)
        stand(config.how)
    run.world.barrier()


def forward(world: "World") -> None:
    """Past the start, which may take long."""
    from torch import nn

    world.shard(nn.Linear(2, 2), "cpu")(lambda: None)


def stand(how: str) -> None:
    """Does not return by itself."""
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    threading.Event().wait(600)


STAGES = {JobKind.SFT: Stage(config=f"{__name__}:Config", run=f"{__name__}:stand_still")}

if __name__ == "__main__":
    sys.exit(worker.main(stages=STAGES))
