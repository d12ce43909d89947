"""The report: any folder becomes one page that loads nothing, and nothing that a run wrote becomes markup."""

import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steersman.trainer.report.__main__ import main
from steersman.trainer.report.load import columns_of, load
from steersman.trainer.report.page import chosen_pairs, headline, render
from steersman.trainer.report.panels import run_panels

EVIL = "<script>alert('&amp;\"')</script>"
VOID = {"meta", "br", "link", "img", "input", "line", "rect", "circle", "polyline", "hr"}


class Checker(HTMLParser):
    """Notes unbalanced tags, and every place that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag in ("script", "link", "iframe", "object", "img"):
            self.loads.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> str:
    """Asserts a balanced page that loads nothing; returns its text."""
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loads == []
    assert "url(" not in page
    return " ".join(" ".join(checker.text).split())


def write_run(directory: Path, rows: Sequence[Mapping[str, Any]], **files: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in files.items():
        if isinstance(value, list):
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in value))
        else:
            (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def ppo_rows(num: int) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "time": 1e9 + step,
            "objective/scores": step / num,
            "objective/kl": step * 0.1,
            "time/update_seconds": 0.5,
            "time/rollout_seconds": 0.25,
            "trainer/busy_share": 0.6,
            "policy/clipfrac_avg": float("nan"),
        }
        for step in range(1, num + 1)
    ]


def test_a_ppo_run_becomes_a_page(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run-7",
        ppo_rows(60),
        job={"kind": "ppo", "config": {"kl": {"coefficient": 0.05}, "actor": {"path": EVIL}}},
        samples=[{"step": 1, "prompt": EVIL, "response": "fine & well", "score": 0.5}],
    )
    text = check(render(load(run)))
    for expected in ("run-7", "Proximal policy optimisation", "KL to the reference", "kl.coefficient", EVIL):
        assert expected in text
    titles = [panel.title for panel in run_panels("ppo", load(run).runs[0].columns)]
    assert titles == ["Reward", "KL to the reference", "Seconds by phase", "Trainer busy share"]


@pytest.mark.parametrize(("kind", "metric"), [("sft", "loss"), ("reward_model", "accuracy"), ("other", "whatever")])
@pytest.mark.parametrize("num", [1, 2, 3000])
def test_runs_of_every_kind_and_length(tmp_path: Path, kind: str, metric: str, num: int) -> None:
    rows = [{"step": step, "time": 1e9 + step, metric: 1.0 / step} for step in range(1, num + 1)]
    page = render(load(write_run(tmp_path / "run", rows, job={"kind": kind, "config": {}})))
    check(page)
    assert page.count("<svg") == 1
    assert len(page) < 300_000


def test_a_pipeline_folder_shows_the_win_rate_and_pairs(tmp_path: Path) -> None:
    write_run(tmp_path / "jobs" / "ppo", ppo_rows(3), job={"kind": "ppo", "config": {}})
    write_run(tmp_path / "jobs" / "sft", [{"step": 1, "time": 1.0, "loss": 2.0}], job={"kind": "sft", "config": {}})
    estimate = {"value": 1.0, "low": 0.5, "high": 1.5, "num": 200}
    summary = {
        "title": EVIL,
        "gold_win_rate": 0.8125,
        "gold_win_rate_interval": [0.75, 0.86],
        "kl": 4.25,
        "num_eval_prompts": 200,
        "seconds": 301.0,
        "phase_seconds": {EVIL: 3.0, "ppo": 120.5},
        "gold_before": estimate,
        "gold_after": estimate,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    pairs = [{"prompt": EVIL, "before": "a", "after": "b", "gold_before": 1, "gold_after": 2}]
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(pairs[0]) + "\n{cut off")
    (tmp_path / "gold.jsonl").write_text('{"step": 0, "gold_reward": 0.5}\n{"step": 9, "gold_reward": 2}\n')
    data = load(tmp_path)
    assert [run.kind for run in data.runs] == ["sft", "ppo"]
    text = check(render(data))
    for expected in ("81.2%", "75.0% to 86.0%", "5 min 01 s", "Gold reward", "1.00 ± 0.50", EVIL):
        assert expected in text
    assert [figure.value for figure in headline(data)][:2] == ["81.2%", "4.25"]


def test_without_a_hidden_rule_the_reward_model_judges(tmp_path: Path) -> None:
    summary = {"gold_win_rate": None, "reward_win_rate": {"value": 0.6, "low": 0.5, "high": 0.7, "num": 100}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (figure,) = headline(load(tmp_path))
    assert (figure.label, figure.value) == ("Win rate over SFT by the reward model", "60.0%")


def test_the_command_writes_the_page_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", ppo_rows(2))
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    check((run / "report.html").read_text())
    assert main([str(run), "-o", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()
    assert main([str(tmp_path / "nothing")]) == 2
    assert "RUN_DIR" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert list(tmp_path.rglob("*.partial")) == []


def test_what_is_no_number_is_no_point() -> None:
    rows = [{"step": 1, "a": 1, "b": "x", "c": True, "d": None, "e": float("inf")}, {"step": 2, "a": float("nan")}]
    assert columns_of(rows) == {"a": [(1.0, 1.0)]}


def test_pairs_are_taken_evenly() -> None:
    rows = [{"prompt": str(number)} for number in range(240)]
    assert [row["prompt"] for row in chosen_pairs(rows)] == [str(number) for number in range(0, 240, 10)]
    assert chosen_pairs(rows[:3]) == rows[:3]


def test_the_page_has_no_colour_outside_its_palette(tmp_path: Path) -> None:
    page = render(load(write_run(tmp_path / "run", ppo_rows(50))))
    body = page.partition("</style>")[2]
    assert not re.search(r'(fill|stroke|style)="', body)
