"""Results on disk: one JSON file a benchmark and day, and a table made from all of them.

    2026-01-31-ppo.json   {"name": "ppo", "date": "2026-01-31", "machine": {...}, "figures": {"x": 1.7},
                           "targets": {"x": {"what": "...", "at_least": 1.5}}, "detail": {...}}
    README.md             the newest value of every figure

The table is made from the files alone, so that it never says anything which they do not.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import Target

TABLE_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one benchmark found. `date` is ISO 8601 (a day); `detail` is whatever explains the figures."""

    name: str
    date: str
    machine: Mapping[str, Any]
    figures: Mapping[str, float]
    targets: Mapping[str, Target] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.figures.items():
            if not math.isfinite(value):
                raise ValueError(f"figures.{name} is {value}, must be finite: a failure is not a figure")


def write_result(folder: Path, result: Result) -> Path:
    """Writes `<date>-<name>.json` whole or not at all, over one of the same day; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "name": result.name,
        "date": result.date,
        "machine": dict(result.machine),
        "figures": dict(result.figures),
        "targets": {
            name: {key: value for key, value in asdict(target).items() if value is not None}
            for name, target in result.targets.items()
        },
        **result.detail,
    }
    path = folder / f"{result.date}-{result.name}.json"
    _write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def write_table(folder: Path) -> Path:
    """Makes `README.md` anew from the JSON files in `folder`; returns its path."""
    rows = "".join(_row(figure, content) for figure, content in newest_figures(folder).items())
    text = (
        "# Benchmark results\n\n"
        "The newest value of every figure, made by `python -m benchmarks` from the JSON files beside it, which say\n"
        "how each was measured.\n\n"
        "| figure | what | target | reached | met | date | machine |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n" + rows
    )
    path = folder / TABLE_FILE
    _write(path, text)
    return path


def newest_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Figure name to the content of the newest file that has it, ascending by benchmark, then as listed there."""
    files = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    contents = [content for content in files if isinstance(content, dict) and "figures" in content]
    newest: dict[str, dict[str, Any]] = {}
    for content in sorted(contents, key=lambda content: str(content["date"])):
        newest |= dict.fromkeys(content["figures"], content)
    order = {id(content): list(content["figures"]) for content in contents}
    return dict(sorted(newest.items(), key=lambda item: (str(item[1]["name"]), order[id(item[1])].index(item[0]))))


def _row(figure: str, content: Mapping[str, Any]) -> str:
    value = float(content["figures"][figure])
    stated = content.get("targets", {}).get(figure)
    target = Target(**stated) if stated else Target(what=str(content["name"]))
    verdict = {True: "yes", False: "**no**", None: "-"}[target.met(value)]
    cells = (f"`{figure}`", target.what, str(target), f"{value:.4g}", verdict, content["date"])
    return "| " + " | ".join(map(str, (*cells, _machine_in_words(content["machine"])))) + " |\n"


def _machine_in_words(machine: Mapping[str, Any]) -> str:
    words = [str(machine["cpu"])] if "cpu" in machine else []
    if machine.get("accelerator"):
        words.append(str(machine["accelerator"]))
    if "cores" in machine:
        words.append(f"{machine['cores']} cores")
    if "memory_gib" in machine:
        words.append(f"{float(machine['memory_gib']):.0f} GiB")
    return ", ".join(words) or "-"


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
