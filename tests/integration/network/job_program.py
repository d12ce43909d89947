"""A PPO job that says what happens, one JSON object a line, and waits after some steps for a line of input.

job_program.py '{"directory": ..., "config": {...}, "pause_after": [1, 3]}'
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steersman.trainer.stages.ppo import run_ppo
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.run import Run


def say(**event: Any) -> None:
    """One event."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class Teller:
    """Passes on what a listener hears."""

    def __init__(self, pause_after: set[int]) -> None:
        self._pause_after = pause_after

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        say(event="step", step=step)
        if step in self._pause_after:
            sys.stdin.readline()

    def on_progress(self, step: int, total_steps: int, message: str) -> None:
        say(event="progress", step=step, message=message)


def main() -> None:
    """Runs the job."""
    given = json.loads(sys.argv[1])
    with Run(Path(given["directory"]), run_id="demo", listener=Teller(set(given["pause_after"]))) as run:
        result = run_ppo(PpoConfig.model_validate(given["config"]), run)
    say(event="end", steps=result.steps, stopped=result.stopped)


if __name__ == "__main__":
    main()
