"""What the benchmarks make of raw measurements, without a service."""

from pathlib import Path

import pytest
import torch
from benchmarks import ppo, scoring, toymodel
from transformers import AutoTokenizer

from steersman.serving.batching import BatchingSettings
from steersman.trainer.stages.ppo_config import PpoConfig

PLAN = ppo.Plan(turns=1, warm_up=2, counted=3)


def metric_rows(times: list[float]) -> list[dict[str, float]]:
    return [
        {
            "step": float(number),
            "time": time,
            "episode": 64.0 * number,
            "time/update_seconds": float(number),
            "rollout/response_length_mean": 16.0 + number,
            "trainer/busy_share": 0.5,
        }
        for number, time in enumerate(times, start=1)
    ]


def test_our_clock_runs_over_the_counted_batches_only() -> None:
    # Slow warm-up, three counted batches of 2 s, and a last one that does not count.
    turn = ppo.steersman_turn(metric_rows([50.0, 100.0, 102.0, 104.0, 106.0, 106.5]), PLAN)
    assert turn.samples_per_s == pytest.approx(32.0)
    assert turn.mean_response_tokens == pytest.approx(20.0)
    assert turn.detail["seconds_per_batch"] == {"update_seconds": 4.0}
    assert turn.detail["trainer_busy_share"] == 0.5


def test_a_job_that_stopped_early_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="needed are 5"):
        ppo.steersman_turn(metric_rows([1.0, 2.0, 3.0]), PLAN)


def test_the_other_sides_clock_runs_over_as_many_batches() -> None:
    report = {
        "seconds": [9.0, 5.0, 4.0, 4.0, 4.0],
        "generation_seconds": [5.0, 3.0, 1.0, 2.0, 3.0],
        "mean_response_tokens": [1.0, 1.0, 15.0, 16.0, 17.0],
        "software": {"trl": "1"},
    }
    turn = ppo.trl_turn(report, PLAN)
    assert turn.samples_per_s == pytest.approx(16.0)
    assert turn.mean_response_tokens == 16.0
    assert turn.detail["seconds_per_batch"] == {"step_seconds": 4.0, "generation_seconds": 2.0}
    with pytest.raises(RuntimeError, match="TRL did 4 batches"):
        ppo.trl_turn(report | {"seconds": [9.0, 5.0, 4.0, 4.0]}, PLAN)


def test_the_job_is_one_that_the_trainer_takes(tmp_path: Path) -> None:
    inputs = ppo.Inputs(policy=tmp_path, reward=tmp_path, prompts=tmp_path / "prompts.jsonl", directory=tmp_path)
    addresses = {"policy": "127.0.0.1:1", "reference": "127.0.0.1:2", "reward": "127.0.0.1:3"}
    config = PpoConfig.model_validate(ppo.job_config(inputs, addresses, steps=5, max_staleness=1))
    assert (config.samples_per_step, config.num_epochs, config.num_minibatches) == (64, 1, 1)
    assert (config.optimizer.learning_rate, config.critic_optimizer.learning_rate) == (1e-6, 1e-6)


def test_micro_batches_hold_every_item_once_and_keep_the_budget() -> None:
    lengths = [3, 90, 10, 10, 90, 91, 2, 50]
    settings = BatchingSettings(max_batch_tokens=200, max_batch_items=3, batch_overhead_tokens=8)
    batches = scoring.cut_batches(lengths, settings)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 3
        assert max(lengths[index] for index in batch) * len(batch) <= 200
    assert lengths[batches[0][0]] == 91


def test_an_item_beyond_the_budget_is_alone() -> None:
    settings = BatchingSettings(max_batch_tokens=10, batch_overhead_tokens=0)
    assert scoring.cut_batches([50, 5], settings) == [[0], [1]]


def test_the_model_ends_responses_after_the_wanted_mean() -> None:
    mean_tokens, limit, count = 4.0, 16, 128
    model = toymodel.build_policy(seed=0, mean_tokens=mean_tokens, limit=limit)
    torch.manual_seed(7)
    prompt_BT = torch.tensor(toymodel.encode(toymodel.build_prompts(count, toymodel.PROMPT_TOKENS, seed=3)))
    made_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        do_sample=True,
        top_k=0,
        max_new_tokens=limit,
    )[:, toymodel.PROMPT_TOKENS :]
    before_end_B = ((made_BT == toymodel.EOS).cumsum(1) == 0).sum(1)
    mean = float(torch.clamp(before_end_B + 1, max=limit).float().mean())
    # The standard deviation of a length is about its mean: four of the mean's standard errors.
    assert mean == pytest.approx(mean_tokens, abs=4 * mean_tokens / count**0.5)


def test_the_other_model_never_ends_a_response() -> None:
    model = toymodel.build_policy(seed=0, mean_tokens=None, limit=64)
    ids_BT = torch.randint(toymodel.FIRST_LETTER, toymodel.VOCABULARY, (4, 64))
    with torch.no_grad():
        chance_BTV = model(ids_BT).logits.softmax(-1)
    assert float(chance_BTV[..., [toymodel.PAD, toymodel.EOS]].max()) < 1e-9


def test_both_sides_read_the_same_tokens(tmp_path: Path) -> None:
    toymodel.save(toymodel.build_policy(seed=0, mean_tokens=None, limit=8), tmp_path)
    prompts = toymodel.build_prompts(4, toymodel.PROMPT_TOKENS, seed=2)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read(prompts)["input_ids"] == toymodel.encode(prompts)
    assert (read.pad_token_id, read.eos_token_id) == (toymodel.PAD, toymodel.EOS)
