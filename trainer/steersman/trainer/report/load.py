"""Reads what a run left in its folder. Missing files are nothing to complain of: a run may be young, or have failed.

A *run folder* has metrics.jsonl, samples.jsonl, job.json and result.json, as far as they exist. A *pipeline folder* has
summary.json, evaluation.jsonl and gold.jsonl, and run folders below it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Row = Mapping[str, Any]

METRICS_FILE: Final = "metrics.jsonl"
SAMPLES_FILE: Final = "samples.jsonl"
SUMMARY_FILE: Final = "summary.json"
EVALUATION_FILE: Final = "evaluation.jsonl"
GOLD_FILE: Final = "gold.jsonl"

_NOT_METRICS: Final = frozenset({"step", "time"})
_KIND_ORDER: Final = ("sft", "reward_model", "ppo")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run: `columns` maps a metric's name to its (step, value) points, not-finite values left out."""

    directory: Path
    kind: str
    columns: Mapping[str, Sequence[tuple[float, float]]]
    samples: Sequence[Row] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.directory.name


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report shows; runs in the order sft, reward_model, ppo."""

    directory: Path
    runs: Sequence[RunData]
    summary: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Sequence[Row] = ()
    gold: Sequence[Row] = ()


def load(directory: Path) -> ReportData:
    """Reads a run folder or a pipeline folder. ValueError if it is neither."""
    if not directory.is_dir():
        raise ValueError(f"RUN_DIR is {str(directory)!r}, allowed: an existing folder")
    if (directory / METRICS_FILE).exists():
        runs = [load_run(directory)]
    else:
        found = [load_run(path.parent) for path in sorted(directory.glob(f"*/**/{METRICS_FILE}"))]
        runs = sorted(found, key=lambda run: (_order(run.kind), run.name))
    summary = _read_json(directory / SUMMARY_FILE)
    if not runs and not summary:
        raise ValueError(
            f"RUN_DIR is {str(directory)!r}, allowed: a folder with {METRICS_FILE}, or with such folders in it"
        )
    return ReportData(
        directory=directory,
        runs=runs,
        summary=summary,
        evaluation=read_rows(directory / EVALUATION_FILE),
        gold=read_rows(directory / GOLD_FILE),
    )


def load_run(directory: Path) -> RunData:
    """Reads one run folder."""
    rows = read_rows(directory / METRICS_FILE)
    job = _read_json(directory / "job.json")
    times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
    columns = columns_of(rows)
    return RunData(
        directory=directory,
        kind=str(job.get("kind") or _guess_kind(columns)),
        columns=columns,
        samples=read_rows(directory / SAMPLES_FILE),
        config=job.get("config") or {},
        result=_read_json(directory / "result.json"),
        num_steps=max((int(row.get("step", 0)) for row in rows), default=0),
        seconds=max(times) - min(times) if times else 0.0,
    )


def columns_of(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """The finite numbers of rows by name, with their steps."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in _NOT_METRICS and number and math.isfinite(value):
                columns.setdefault(name, []).append((float(row.get("step", 0)), float(value)))
    return columns


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file, none if it is missing; a last line that is cut off ends them."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _guess_kind(columns: Mapping[str, object]) -> str:
    if any(name.startswith("objective/") for name in columns):
        return "ppo"
    return "reward_model" if any("accuracy" in name for name in columns) else "sft"


def _order(kind: str) -> int:
    return _KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER)
