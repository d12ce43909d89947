"""Real vLLM on CPU: weights that were swapped in live against an engine that was started with them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PROGRAM = Path(__file__).with_name("engine_program.py")


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program saw: tied embeddings with biases (Qwen2), untied ones without (Llama)."""
    folders = [tmp_path_factory.mktemp(request.param) for _ in range(2)]
    for seed, folder in enumerate(folders):
        save_model(request.param, folder, seed)
    finished = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def test_the_models_differ(report: dict[str, Any]) -> None:
    assert report["fresh_a"] != report["fresh_b"]


def test_swapped_weights_are_bit_equal_to_a_fresh_engine(report: dict[str, Any]) -> None:
    assert report["switched"] == report["fresh_b"]
    assert report["switched_again"] == report["fresh_b"]


def test_rollback_is_bit_equal_to_the_start(report: dict[str, Any]) -> None:
    assert report["rolled_back"] == report["fresh_a"]


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve_on(report: dict[str, Any]) -> None:
    assert report["refused"] == {"missing": True, "unknown": True, "shape": True, "discarded": True}
    assert report["after_refusals"] == report["fresh_a"]


def test_running_requests_go_on_and_every_token_has_its_version(report: dict[str, Any]) -> None:
    assert report["live"]["num_running"] == 6
    for sample in report["live"]["samples"]:
        assert (sample["finish"], len(sample["tokens"]), len(sample["logprobs"])) == ("length", 400, 400)
        (first, start, switch), (second, again, end) = sample["versions"]
        assert (first, second) == ("initial", "run@1")
        assert (start, again, end) == (0, switch, 400)
        assert 0 < switch < 400


def test_a_cancelled_request_is_aborted_in_the_engine(report: dict[str, Any]) -> None:
    assert report["abort"] == {"held": True, "freed": True, "none_unfinished": True}
    assert report["after_abort"] == report["fresh_b"]
