"""Scores per second through the reward service over gRPC, against the same model called in process.

In process means: the service's own engine, called with the micro-batches that its batcher would cut (longest first, up
to the token budget, split where padding would cost more than another batch), on as many threads. Both score the same
requests in turn, A B A B, and the figure is the median of the ratios of neighbours. Over gRPC the clock starts before
the client encodes its request and stops after it decoded the last score; client and server share the machine.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import toymodel
from benchmarks.context import Context, Measured
from benchmarks.figures import paired_ratio, spread
from benchmarks.stack import CORES, Service, running
from steersman.client import RewardClient, ScoreItem
from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.reward.settings import ModelScorerSettings
from steersman.serving.batching import BatchingSettings, worth_padding

ITEMS = 256
RESPONSE_TOKENS = 192

Row = NDArray[np.int32]


def run(context: Context) -> Measured:
    """Measures `score_grpc_vs_inprocess`."""
    torch.set_num_threads(CORES)
    model = _save_model(context.directory / "model")
    rows = _rows(32 if context.quick else ITEMS)
    engine = TorchScoreEngine.load("model", ModelScorerSettings(model=str(model), dtype="float32"))
    batches = cut_batches([len(row) for row in rows], BatchingSettings())
    items = [ScoreItem(prompt=row[: toymodel.PROMPT_TOKENS], response=row[toymodel.PROMPT_TOKENS :]) for row in rows]

    def in_process() -> list[float]:
        scores = [0.0] * len(rows)
        for batch in batches:
            for index, score in zip(batch, engine.score([rows[index] for index in batch]), strict=True):
                scores[index] = score
        return scores

    service = Service(
        name="reward",
        settings={"scorers": {"reward": {"model": str(model), "dtype": "float32"}}, "num_threads": CORES},
        environment={"OMP_NUM_THREADS": str(CORES)},
    )
    with running([service], context.directory) as stack, RewardClient(stack.addresses["reward"]) as client:

        def over_grpc() -> list[float]:
            return [score.unwrap() for score in client.score(items)]

        worst = float(np.max(np.abs(np.array(over_grpc()) - np.array(in_process()))))
        if worst > 1e-4:
            raise RuntimeError(f"the two sides differ by {worst} in a score: they do not run the same model")
        grpc_rates, own_rates = _alternate(over_grpc, in_process, len(rows), rounds=3 if context.quick else 30)
    ratio = paired_ratio(grpc_rates, own_rates)
    return Measured(
        figures={"score_grpc_vs_inprocess": ratio.median},
        detail={
            "ratio": asdict(ratio),
            "grpc_scores_per_s": asdict(spread(grpc_rates)),
            "in_process_scores_per_s": asdict(spread(own_rates)),
            "items_per_request": len(rows),
            "mean_tokens_per_item": float(np.mean([len(row) for row in rows])),
            "micro_batches": len(batches),
            "threads": CORES,
            "largest_difference_of_a_score": worst,
        },
    )


def cut_batches(lengths: Sequence[int], settings: BatchingSettings) -> list[list[int]]:
    """Indices of `lengths` in micro-batches, as the service's batcher cuts a request that finds it idle."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    batches = []
    while order:
        limit = max(1, min(settings.max_batch_items, settings.batch_tokens // lengths[order[0]]))
        keep = worth_padding([lengths[index] for index in order[:limit]], settings.batch_overhead_tokens)
        batches.append(order[:keep])
        order = order[keep:]
    return batches


def _alternate(
    one: Callable[[], object], other: Callable[[], object], num_items: int, *, rounds: int
) -> tuple[list[float], list[float]]:
    """Items per second of both, round by round; which goes first changes from round to round."""
    for warm_up in (one, other):
        warm_up()
    rates: dict[Callable[[], object], list[float]] = {one: [], other: []}
    for index in range(rounds):
        for score in (one, other) if index % 2 == 0 else (other, one):
            start = time.perf_counter()
            score()
            rates[score].append(num_items / (time.perf_counter() - start))
    return rates[one], rates[other]


def _save_model(folder: Path) -> Path:
    policy = toymodel.build_policy(seed=0, mean_tokens=None, limit=RESPONSE_TOKENS)
    return toymodel.save(toymodel.build_scalar_model(policy, seed=1), folder)


def _rows(count: int) -> list[Row]:
    draw = random.Random(5)
    lengths = [toymodel.PROMPT_TOKENS + draw.randint(1, RESPONSE_TOKENS) for _ in range(count)]
    return [
        np.array(draw.choices(range(toymodel.FIRST_LETTER, toymodel.VOCABULARY), k=length), np.int32)
        for length in lengths
    ]
