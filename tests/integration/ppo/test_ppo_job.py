"""A short PPO job through real services: vLLM, reference and reward as processes, the trainer here.

The reward counts one token; so what the job should learn is known, and what it learned is read from its metrics.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_job import save_model, settings, tokenizer_of

from steersman.cli.supervisor import ServiceSpec, Supervisor, free_port
from steersman.trainer.jobs import standalone
from steersman.trainer.stages.ppo import run_ppo
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.run import Run, read_rows

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
STEPS = 12
SCORER = '''
"""Counts a word."""


def score(items):
    return [float(item.response.split().count("w7")) / 12.0 for item in items]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scorer") / "count.py"
    path.write_text(SCORER)
    return path


@pytest.fixture(scope="module")
def services(model: Path, scorer: Path) -> Iterator[tuple[Supervisor, dict[str, str]]]:
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("policy", "reference", "reward")}
    arguments = {
        "policy": ["--model", str(model), "--dtype", "float32", "--kv-cache-mib", "32", "--max-num-seqs", "32"],
        "reference": ["--model", str(model), "--dtype", "float32"],
        "reward": [
            "--scorers",
            json.dumps({"count": {"function": f"{scorer}:score", "tokenizer": str(tokenizer_of(model))}}),
        ],
    }
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    specs = [
        ServiceSpec.of(
            name,
            [*arguments[name], "--port", address.rpartition(":")[2], "--metrics-port", "0"],
            address=address,
            environment=environment,
        )
        for name, address in addresses.items()
    ]
    with Supervisor(specs) as supervisor:
        yield supervisor, addresses


def config(model: Path, folder: Path, addresses: dict[str, str], **changes: Any) -> PpoConfig:
    services = {"policies": [addresses["policy"]], "reference": addresses["reference"], "reward": addresses["reward"]}
    return PpoConfig.model_validate(settings(model, folder, services, **changes))


def test_ppo_learns_through_real_services_and_survives_the_death_of_the_policy(
    services: tuple[Supervisor, dict[str, str]], model: Path, tmp_path: Path
) -> None:
    supervisor, addresses = services
    said: list[str] = []
    deaths: list[int] = []

    class Killer:
        """Kills the policy once, in the middle of the run, and has it started again."""

        def on_metrics(self, step: int, metrics: Any) -> None:
            if step == 3:
                deaths.append(step)
                supervisor["policy"].kill()
                supervisor["policy"].start()

        def on_progress(self, step: int, total_steps: int, message: str) -> None:
            said.append(message)

    job = config(model, tmp_path, addresses, total_steps=STEPS, max_staleness=2)
    with Run(tmp_path / "run", run_id="demo", listener=Killer()) as run:
        result = run_ppo(job, run)

    assert (result.steps, result.stopped, deaths) == (STEPS, False, [3])
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["episode"] for row in rows] == [32.0 * step for step in range(1, STEPS + 1)]  # none lost or doubled
    assert sum(row["rollout/dropped"] for row in rows) == 0
    # Only what changed travelled, from the first update on, and again after the policy had come back.
    assert rows[1]["push/delta_share"] > 0.9  # the first row tells of the push before the first update
    assert rows[-1]["push/delta_share"] > 0.9
    assert any("waiting for policy at" in message for message in said)
    # vLLM and the trainer agree where the same weights drew and trained: the first batch, and who knows which later.
    assert rows[0]["rollout/stale_token_share"] == 0
    on_policy = [row["mismatch/logprob_abs_max_on_policy"] for row in rows if "mismatch/kl_on_policy" in row]
    assert len(on_policy) >= 1
    assert max(on_policy) < 1e-4
    # Batches to come are drawn during the updates, by weights within the bound; a rate this high shows in their tokens.
    assert 1 <= max(row["rollout/staleness_max"] for row in rows) <= 2
    assert max(row.get("mismatch/logprob_abs_mean_age_1", 0.0) for row in rows) > 1e-3
    assert abs(rows[0]["objective/kl"]) < 1e-3
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.1
    assert all(math.isfinite(row["loss/value_avg"]) for row in rows)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_bad_limits_are_refused_before_anything_is_generated(
    services: tuple[Supervisor, dict[str, str]], model: Path, tmp_path: Path
) -> None:
    _, addresses = services
    job = config(model, tmp_path, addresses, max_prompt_tokens=120)
    with Run(tmp_path / "run", run_id="demo") as run, pytest.raises(ValueError, match="must be at most 128"):
        run_ppo(job, run)


def test_two_ranks_push_their_shards_into_a_real_engine(
    services: tuple[Supervisor, dict[str, str]], model: Path, tmp_path: Path
) -> None:
    _, addresses = services
    settings = config(model, tmp_path, addresses, total_steps=4, max_staleness=0)
    run_directory, spec, log = tmp_path / "run", tmp_path / "spec.json", tmp_path / "log.txt"
    job = {"job_id": "ranks", "kind": "ppo", "config": settings.model_dump(mode="json"), "resources": {}}
    spec.write_text(json.dumps(job))
    assert standalone.prepare(run_directory, spec)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*launcher, "--nproc-per-node", "2", "-m", "steersman.trainer.jobs.worker", str(run_directory)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        ) as ranks,
    ):
        try:
            assert ranks.wait(240) == 0, log.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
    rows = read_rows(run_directory / "metrics.jsonl")
    assert [row["episode"] for row in rows] == [32.0, 64.0, 96.0, 128.0]
    # What the engine drew with and what the ranks train are the same weights, after each push of shards.
    assert max(row["mismatch/logprob_abs_max"] for row in rows) < 1e-4
    assert rows[-1]["push/delta_share"] > 0.9
    assert rows[-1]["objective/kl"] > 1e-3
    assert (run_directory / "model" / "model.safetensors").is_file()
