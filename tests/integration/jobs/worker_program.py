"""A worker with a stage of its own that counts, and does what the test writes into its settings."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from steersman.trainer.jobs import worker
from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import Stage

if TYPE_CHECKING:
    from steersman.trainer.stages.run import Run


class CountConfig(BaseModel, extra="forbid"):
    """Settings of the counting stage."""

    steps: int = Field(ge=1)
    # At half of the way of a first attempt: go on, wait for the end of the world, fail, or die.
    halfway: Literal["go-on", "wait", "fail", "die"] = "go-on"


@dataclass(frozen=True, kw_only=True)
class CountResult:
    """How far it counted."""

    steps: int
    stopped: bool
    first_step: int


def run_count(config: CountConfig, run: "Run") -> CountResult:
    """Counts to `steps`, with a checkpoint after each."""
    checkpoint = run.directory / "count.json"
    first = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    run.rewind(first)
    for step in range(first + 1, config.steps + 1):
        run.log(step, {"count": step})
        run.progress(step, config.steps, "counting")
        partial = checkpoint.with_suffix(".partial")
        partial.write_text(json.dumps({"step": step}))
        partial.replace(checkpoint)
        if step == config.steps // 2 and first == 0:
            halfway(config.halfway, run)
        if run.stop_requested():
            return CountResult(steps=step, stopped=step < config.steps, first_step=first)
    return CountResult(steps=config.steps, stopped=False, first_step=first)


def halfway(what: str, run: "Run") -> None:
    """Does what the test asked for."""
    match what:
        case "wait":
            deadline = time.monotonic() + 120
            while not run.stop_requested() and time.monotonic() < deadline:
                time.sleep(0.01)
        case "fail":
            raise ValueError("counted the wrong way")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)


STAGES = {JobKind.SFT: Stage(config=f"{__name__}:CountConfig", run=f"{__name__}:run_count")}

if __name__ == "__main__":
    sys.exit(worker.main(stages=STAGES))
