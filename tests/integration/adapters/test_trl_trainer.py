"""A real GRPOTrainer, a real reward server, and scores that fail now and then."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steersman.cli.supervisor import ServiceSpec, Supervisor, free_port

pytest.importorskip("trl")

SECONDS = 240
PROGRAM = Path(__file__).with_name("trl_program.py")
# Every tenth call fails for one item, which TRL must then leave out.
SCORER = """
seen = []

def w3(items):
    assert all(item.context["answer"] in item.prompt for item in items)
    seen.extend(items)
    scores = [item.response.split().count("w3") / 6 for item in items]
    return [None, *scores[1:]] if len(seen) % 10 == 0 else scores
"""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_trl_learns_from_the_service(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(SCORER)
    port = free_port()
    settings = {"scorers": {"w3": {"function": f"{tmp_path / 'rules.py'}:w3"}}, "port": port, "metrics_port": None}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(settings))
    spec = ServiceSpec.of("reward", ["--config", str(tmp_path / "reward.yaml")], address=f"127.0.0.1:{port}")
    lines: list[str] = []
    with Supervisor([spec], on_line=lambda _, line: lines.append(line), start_timeout=120.0):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), f"127.0.0.1:{port}", str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    rewards = json.loads((tmp_path / "history.json").read_text())
    assert len(rewards) == 25
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
