"""The load of the reward benchmark, and oracles that agree with each other and with the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import reward_load
from transformers import Qwen2ForSequenceClassification


def test_lengths_are_the_same_for_every_seed_and_tokens_are_fresh() -> None:
    first, second = reward_load.draw_items(6, seed=1), reward_load.draw_items(6, seed=2)
    for items in (first, second):
        assert len(items) == 6 * reward_load.RESPONSES_PER_PROMPT
        lengths = [len(item.row) for item in items]
        assert min(lengths) >= reward_load.SHORTEST
        assert max(lengths) <= reward_load.LONGEST
    assert reward_load.describe(first) == reward_load.describe(second)
    assert not {item.prompt.tobytes() for item in first} & {item.prompt.tobytes() for item in second}


def test_a_prompt_counts_once() -> None:
    facts = reward_load.describe(reward_load.draw_items(3, seed=1))
    assert facts["tokens_with_each_prompt_once"] < facts["tokens"] / 1.5


def test_the_oracles_agree_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reward_load.save_model(tmp_path / "model", quick=True)
    model = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    items = reward_load.draw_items(2, seed=1)
    with torch.no_grad():
        expected = [float(model(torch.tensor([item.row.tolist()])).logits[0, 0]) for item in items]
    for oracle in (reward_load.PackedOracle(folder), reward_load.CachedOracle(folder)):
        # Weights and activations are bfloat16 here: three digits.
        np.testing.assert_allclose(oracle(items), expected, atol=0.05)
