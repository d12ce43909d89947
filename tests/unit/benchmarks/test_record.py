"""A finished pipeline run becomes a result; an unfinished one is refused."""

import json
from pathlib import Path

import pytest
from benchmarks.record import main, result_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    job = folder / "jobs" / "ppo"
    job.mkdir(parents=True)
    names = ("objective/scores", "objective/kl", "rollout/response_length_mean", "trainer/busy_share")
    rows = [{"step": step} | dict.fromkeys(names, step / 10) for step in range(1, 31)]
    (job / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "name": "little-demo",
        "title": "t",
        "about": "a",
        "gold_win_rate": None,
        "kl": 1.5,
        "reward_model_accuracy": {"value": 0.6, "low": 0.5, "high": 0.7, "num": 100},
        "seconds": 12.0,
        "config": {"source": {"file": "/somewhere/private.jsonl"}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_figures_carry_the_name_of_the_pipeline(run: Path) -> None:
    result = result_of(run, date="2026-01-31", machine={})
    assert result.figures == {
        "little_demo_kl": 1.5,
        "little_demo_reward_model_accuracy": 0.6,
        "little_demo_seconds": 12.0,
    }
    assert result.detail["detail"]["reward_model_accuracy"]["low"] == 0.5


def test_the_curve_runs_from_first_to_last_step(run: Path) -> None:
    curve = result_of(run, date="2026-01-31", machine={}).detail["detail"]["ppo_curve"]
    assert (len(curve), curve[0]["step"], curve[-1]["step"]) == (12, 1, 30)


def test_no_path_of_the_machine_is_recorded(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--output", str(tmp_path / "results")]) == 0
    (written,) = (tmp_path / "results").glob("*.json")
    assert "private" not in written.read_text()


def test_an_unfinished_run_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").unlink()
    with pytest.raises(SystemExit):
        main([str(run)])
    assert "allowed: the folder of a finished pipeline run" in capsys.readouterr().err
