"""The oracles in a process of their own, whose threads wait as those of the servers do.

    python -m benchmarks.reward_oracle MODEL

reads one request a line, {"oracle": "packed" or "cached", "prompts": N, "seed": N}, draws the items, scores them with
nothing between itself and the model, and writes {"seconds": X, "scores": [...]}.

The oracles use the machine as well as the service does: as many batches side by side, a share of the cores each. The
one that shares the service's engine shares its way to divide a wave, too. What they do not have is callers.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.reward_load import CachedOracle, PackedOracle, Score, draw_items
from benchmarks.stack import CORES, thread_environment


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Scores in the order of the items, and the seconds that they took."""

    seconds: float
    scores: list[float]


class OracleProcess:
    """The other end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def score(self, oracle: str, num_prompts: int, seed: int) -> Answer:
        """What `oracle` says of the items that `draw_items` draws. Blocks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"oracle": oracle, "prompts": num_prompts, "seed": seed}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the oracle's process has ended; its error is above")
        return Answer(**json.loads(line))


@contextlib.contextmanager
def oracle_process(model: Path) -> Iterator[OracleProcess]:
    """The oracles; they have ended after the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.reward_oracle", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | thread_environment(CORES),
    )
    try:
        yield OracleProcess(process)
    finally:
        process.kill()
        process.communicate()


def main(model: Path) -> None:
    """Answers until its input ends."""
    torch.set_num_threads(CORES)
    oracles: dict[str, Score] = {"packed": PackedOracle(model), "cached": CachedOracle(model)}
    for line in sys.stdin:
        asked = json.loads(line)
        items = draw_items(asked["prompts"], seed=asked["seed"])
        start = time.perf_counter()
        scores = oracles[asked["oracle"]](items)
        print(json.dumps({"seconds": time.perf_counter() - start, "scores": scores}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
