import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.figures import Target
from benchmarks.results import Result, newest_figures, write_result, write_table

MACHINE = {"cpu": "Example 1", "cores": 2, "memory_gib": 23.5, "software": {"torch": "2.0"}}


def result(name: str, date: str, targets: dict[str, Target] | None = None, **figures: float) -> Result:
    return Result(name=name, date=date, machine=MACHINE, figures=figures, targets=targets or {})


def table_rows(folder: Path) -> list[list[str]]:
    lines = write_table(folder).read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_result_is_one_dated_file(tmp_path: Path) -> None:
    written = Result(
        name="ppo",
        date="2026-01-31",
        machine=MACHINE,
        figures={"speed": 1.75},
        targets={"speed": Target(what="how fast", at_least=1.5)},
        detail={"seconds": 12.0},
    )
    path = write_result(tmp_path / "results", written)
    assert path.name == "2026-01-31-ppo.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "name": "ppo",
        "date": "2026-01-31",
        "machine": MACHINE,
        "figures": {"speed": 1.75},
        "targets": {"speed": {"what": "how fast", "at_least": 1.5}},
        "seconds": 12.0,
    }
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_is_a_number(value: float) -> None:
    with pytest.raises(ValueError, match=r"figures\.speed"):
        result("ppo", "2026-01-31", speed=value)


def test_a_second_run_of_the_day_replaces_the_first(tmp_path: Path) -> None:
    write_result(tmp_path, result("ppo", "2026-01-31", speed=1.0))
    write_result(tmp_path, result("ppo", "2026-01-31", speed=2.0))
    assert [row[:4] for row in table_rows(tmp_path)] == [["`speed`", "ppo", "-", "2"]]


def test_the_table_shows_the_newest_value_of_each_figure(tmp_path: Path) -> None:
    write_result(tmp_path, result("ppo", "2026-02-01", fast=2.0))
    write_result(tmp_path, result("ppo", "2026-01-31", fast=1.0, old=5.0))
    write_result(tmp_path, result("agreement", "2026-01-01", difference=1e-6))
    rows = table_rows(tmp_path)
    assert [(row[0], row[3], row[5]) for row in rows] == [
        ("`difference`", "1e-06", "2026-01-01"),
        ("`fast`", "2", "2026-02-01"),
        ("`old`", "5", "2026-01-31"),
    ]


@pytest.mark.parametrize(("value", "verdict"), [(1.5, "yes"), (1.4, "**no**")])
def test_the_table_says_whether_a_target_is_met(tmp_path: Path, value: float, verdict: str) -> None:
    write_result(tmp_path, result("ppo", "2026-01-31", {"speed": Target(what="how fast", at_least=1.5)}, speed=value))
    assert table_rows(tmp_path) == [
        ["`speed`", "how fast", "≥ 1.5", f"{value:g}", verdict, "2026-01-31", "Example 1, 2 cores, 24 GiB"]
    ]


def test_files_without_figures_are_no_results(tmp_path: Path) -> None:
    content: Any
    for number, content in enumerate(([1, 2], {"name": "notes"})):
        (tmp_path / f"{number}.json").write_text(json.dumps(content), encoding="utf-8")
    assert newest_figures(tmp_path) == {}
    assert table_rows(tmp_path) == []
