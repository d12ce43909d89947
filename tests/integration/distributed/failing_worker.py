"""A worker with a stage of which the lead fails at once, while the other rank waits for it."""

import sys
from typing import TYPE_CHECKING

from pydantic import BaseModel

from steersman.trainer.jobs import worker
from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import Stage

if TYPE_CHECKING:
    from steersman.trainer.stages.run import Run


class NoConfig(BaseModel, extra="forbid"):
    """No settings."""


def fail(config: NoConfig, run: "Run") -> None:
    """Never ends well."""
    run.world.barrier()
    if run.world.is_lead:
        raise ValueError("there is no such model")
    run.world.barrier()


STAGES = {JobKind.SFT: Stage(config=f"{__name__}:NoConfig", run=f"{__name__}:fail")}

if __name__ == "__main__":
    sys.exit(worker.main(stages=STAGES))
