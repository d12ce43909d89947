"""The main job in small: four services with real vLLM, three jobs, live weight pushes, a report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

SMALL = {
    "source.num_demonstrations": 200,
    "source.num_comparisons": 32,
    "source.num_held_out_comparisons": 8,
    "sft.max_steps": 4,
    "reward_model.num_epochs": 1,
    "ppo.total_steps": 3,
    "ppo.prompts_per_step": 8,
    "evaluation.num_prompts": 12,
    "evaluation.probe_prompts": 4,
    "evaluation.probe_seconds": 0.2,
    "num_threads": 1,
}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(540)
def test_from_nothing_to_a_report(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    changes = [f"--set={key}={value}" for key, value in SMALL.items()]
    command = [sys.executable, "examples/pipeline.py", "examples/demo.yaml", "--output", str(output), *changes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr

    summary = json.loads((output / "summary.json").read_text())
    assert 0.0 <= summary["gold_win_rate"] <= 1.0
    assert summary["num_eval_prompts"] == 12
    # Every answer before came from the weights of the sft job, every one after from the last push.
    assert (summary["weights_before"], summary["weights_after"]) == ("initial", "ppo.1@3")
    assert summary["kl_interval"][0] <= summary["kl"] <= summary["kl_interval"][1]
    assert 0.0 < sum(summary["phase_seconds"].values()) <= summary["seconds"] + 1.0

    rows = [json.loads(line) for line in (output / "jobs" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["rollout/dropped"] == 0 for row in rows)
    assert len((output / "evaluation.jsonl").read_text().splitlines()) == 12
    steps = [json.loads(line)["step"] for line in (output / "gold.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3
    report = output / "report.html"
    assert "Gold win rate over SFT" in report.read_text()
    assert str(report) in done.stdout
    assert processes_that_name(output) == []


def processes_that_name(directory: Path) -> list[str]:
    """Command lines of processes that were started for a folder and still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(directory) in command and str(os.getpid()) != path.parent.name:
            found.append(command)
    return found
