"""What a worker tells in its log, beside what it logs: lines that a watcher without access to the run folder can read.

@steersman {"step": 3, "total_steps": 100, "message": "drawing rollouts"}
@steersman {"step": 3, "metrics": {"objective/kl": 0.125}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_PREFIX: Final = "@steersman "


@dataclass(frozen=True, kw_only=True)
class Told:
    """One such line: how far the job is, or the numbers of a step."""

    step: int
    total_steps: int = 0
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


def write(told: Told) -> str:
    """The line, without its end."""
    values: dict[str, object] = {"step": told.step}
    if told.metrics:
        values["metrics"] = dict(told.metrics)
    else:
        values |= {"total_steps": told.total_steps, "message": told.message}
    return _PREFIX + json.dumps(values)


def read(line: str) -> Told | None:
    """What a line tells; None for every other line of a log."""
    if not line.startswith(_PREFIX):
        return None
    try:
        values = json.loads(line[len(_PREFIX) :])
        return Told(
            step=int(values["step"]),
            total_steps=int(values.get("total_steps", 0)),
            message=str(values.get("message", "")),
            metrics={str(name): float(value) for name, value in values.get("metrics", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
