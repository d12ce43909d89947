"""What a benchmark is given, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import Target


@dataclass(frozen=True, kw_only=True)
class Context:
    """`quick` asks for the shortest run that still goes through every part: its numbers mean nothing.

    `directory` is empty at the start, for models, logs and run folders, and is removed after the run unless it is asked
    for.
    """

    quick: bool
    directory: Path


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures by name, and the facts that explain them."""

    figures: Mapping[str, float]
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`module` has a function `run(Context) -> Measured`; it is imported only when it is run."""

    name: str
    module: str
    targets: Mapping[str, Target]
