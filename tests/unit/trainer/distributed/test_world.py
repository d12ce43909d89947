import subprocess
import sys

import pytest
import torch

from steersman.trainer.algorithm.metrics import MetricSums
from steersman.trainer.distributed.totals import total
from steersman.trainer.distributed.world import SOLO, direct, launched_rank, launched_size


class Doubled(type(SOLO)):
    """Two ranks of which the other one has the same numbers."""

    size = 2

    def sum(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor *= 2


@pytest.mark.parametrize(
    ("environment", "rank", "size"),
    [
        ({}, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 1),
        ({"RANK": "2", "WORLD_SIZE": "3"}, 2, 3),
        ({"WORLD_SIZE": "8"}, 0, 1),  # a cluster's own variable, without torchrun
    ],
)
def test_torchrun_says_who_a_process_is(environment: dict[str, str], rank: int, size: int) -> None:
    assert (launched_rank(environment), launched_size(environment)) == (rank, size)


def test_a_single_process_is_the_lead_of_nobody() -> None:
    tensor = torch.ones(3)
    SOLO.sum(tensor)
    SOLO.barrier()
    SOLO.tell("update", step=3)
    assert torch.equal(tensor, torch.ones(3))
    assert SOLO.local(tensor) is tensor
    assert (SOLO.is_lead, SOLO.any(True), SOLO.any(False), SOLO.from_lead(b"x")) == (True, True, False, b"x")
    assert SOLO.shard(torch.nn.Linear(2, 2), "cpu") is direct
    assert direct(lambda: 7) == 7
    assert SOLO.blame("ValueError: no") == "ValueError: no"


def test_metrics_are_means_over_all_ranks() -> None:
    sums = MetricSums()
    sums.add({"loss": torch.tensor(6.0), "clipped": torch.tensor(1.0)}, count=3)
    sums.add({"entropy": torch.tensor(2.0)}, count=4)
    both = total(Doubled(), sums)
    assert both.means() == sums.means()
    assert {name: float(value) for name, value in both.totals.items()} == {"loss": 12, "clipped": 2, "entropy": 4}
    assert {name: float(value) for name, value in both.counts.items()} == {"loss": 6, "clipped": 6, "entropy": 8}
    assert total(SOLO, sums) is sums
    assert total(Doubled(), MetricSums()).means() == {}


def test_one_process_loads_nothing_of_what_ranks_need_and_asking_who_it_is_needs_no_torch() -> None:
    program = """
import sys
from steersman.trainer.distributed import world
assert world.launched_size() == 1
assert "torch" not in sys.modules
import steersman.trainer.stages.ppo, steersman.trainer.stages.sft, steersman.trainer.stages.reward_model
for name in ("distributed.ranks", "distributed.shard", "checkpoint.shards", "weights.sharded", "stages.ppo_ranks"):
    assert "steersman.trainer." + name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
