import json
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from steersman.trainer.checkpoint.models import load_actor, load_tokenizer, save_model
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.data.settings import DataSettings
from steersman.trainer.stages.reward_model import run_reward_model
from steersman.trainer.stages.reward_model_config import RewardModelConfig
from steersman.trainer.stages.run import METRICS_FILE, Run, read_rows
from steersman.trainer.stages.settings import OptimizerConfig

GOOD, BAD, PLAIN = ["w3"], ["w4"], ["w5", "w6"]


@pytest.fixture
def rows(words):
    """The response with w3 is better than the one with w4, wherever it stands."""

    def row():
        prompt, tail = words(["w1", "w2"], 1, 5), words(PLAIN, 1, 4)
        return {
            "prompt": prompt,
            "chosen": f"{words(PLAIN, 1, 3)} w3 {tail}",
            "rejected": f"{words(PLAIN, 1, 3)} w4 {tail}",
        }

    return [row() for _ in range(120)]


@pytest.fixture
def config(tiny_model, tiny_tokenizer, write_rows, rows):
    return RewardModelConfig(
        model=tiny_model,
        tokenizer=tiny_tokenizer,
        data=DataSettings(files=(write_rows(rows),)),
        eval_share=0.25,
        max_prompt_tokens=8,
        max_response_tokens=12,
        batch_size=16,
        micro_batch_tokens=200,
        max_steps=30,
        optimizer=OptimizerConfig(learning_rate=0.02),
        device="cpu",
    )


def run_in(directory, config, **options):
    with Run(directory, run_id="test", **options) as run:
        return run_reward_model(config, run)


def served_scores(directory, texts):
    """Scores as a service would give them: Hugging Face classes alone, a padded batch, EOS after each response."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    batch = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)


def test_it_learns_a_preference_and_the_saved_model_serves_it(config, tmp_path):
    result = run_in(tmp_path / "run", config)
    metrics = result.metrics
    assert metrics["eval/num_pairs"] == 30
    assert metrics["eval/accuracy"] > 0.9
    assert 0 < metrics["eval/accuracy_low"] < metrics["eval/accuracy"] <= metrics["eval/accuracy_high"] <= 1
    assert read_rows(tmp_path / "run" / METRICS_FILE)[-1]["eval/accuracy"] == metrics["eval/accuracy"]
    good, bad, long_bad = served_scores(
        result.model_directory, ["w1 w5 w3 w6", "w1 w5 w4 w6", "w1 w2 w1 w2 w5 w5 w6 w4 w5 w6"]
    )
    assert good > bad
    assert good > long_bad


def test_the_saved_configuration_holds_the_moments_of_the_training_scores(config, tmp_path, rows):
    result = run_in(tmp_path / "run", config.model_copy(update={"eval_share": 0.0, "max_steps": 5}))
    saved = json.loads((result.model_directory / "config.json").read_text())
    scores = served_scores(
        result.model_directory, [f"{row['prompt']} {row[name]}" for row in rows for name in ("chosen", "rejected")]
    )
    assert saved["reward_mean"] == pytest.approx(float(scores.mean()), abs=1e-4)
    assert saved["reward_std"] == pytest.approx(float(scores.std(unbiased=False)), abs=1e-4)
    assert saved["pad_token_id"] == 0
    assert saved["reward_encoding"] == "continuation"


def test_ranked_lists_train_as_all_their_pairs(config, tmp_path, write_rows, words):
    generator = random.Random(2)
    ranked = []
    for _ in range(60):
        responses = [f"{words(PLAIN, 0, 2)} {' '.join(['w3'] * n)} w5" for n in (3, 2, 1, 0)]
        order = generator.sample(range(4), 4)
        ranked.append({"prompt": "w1", "responses": [responses[n] for n in order], "ranks": [n + 1 for n in order]})
    data = DataSettings(files=(write_rows(ranked, "ranked.jsonl"),))
    result = run_in(tmp_path / "run", config.model_copy(update={"data": data, "max_steps": 40}))
    assert result.metrics["eval/num_pairs"] == 15 * 6
    assert result.metrics["eval/accuracy"] > 0.85


def test_eos_never_serves_as_padding(config, tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    save_model(tmp_path / "actor", load_actor(tiny_model, tokenizer=tokenizer), tokenizer)
    changed = config.model_copy(
        update={"model": ModelSource(path=str(tmp_path / "actor")), "tokenizer": None, "max_steps": 2}
    )
    result = run_in(tmp_path / "run", changed)
    saved = json.loads((result.model_directory / "config.json").read_text())
    assert saved["pad_token_id"] == 32
    assert saved["vocab_size"] == 33
    alone = served_scores(result.model_directory, ["w1 w3"])
    padded = served_scores(result.model_directory, ["w1 w3", "w1 w3 w4 w5 w6 w6"])
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=1e-5)


def test_stopping_and_going_on_is_bit_for_bit(config, tmp_path):
    config = config.model_copy(update={"max_steps": 6})
    run_in(tmp_path / "straight", config)
    asked = iter([False] * 4 + [True])
    assert run_in(tmp_path / "resumed", config, stop_requested=lambda: next(asked)).stopped
    run_in(tmp_path / "resumed", config)
    straight, resumed = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("straight", "resumed")
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("setting", [{}, {"label_smoothing": 0.2}, {"score_penalty": 0.1}])
def test_micro_batches_change_nothing(config, tmp_path, setting):
    losses = {}
    for budget in (30, 10_000):
        changed = config.model_copy(update={"micro_batch_tokens": budget, "max_steps": 3, **setting})
        losses[budget] = run_in(tmp_path / str(budget), changed).metrics
    for name in ("loss", "eval/loss", "reward_mean"):
        assert losses[30][name] == pytest.approx(losses[10_000][name], rel=1e-3, abs=1e-4)


def test_margins_and_ties_move_the_loss(config, tmp_path, write_rows, rows):
    tied = [{"prompt": "w1", "responses": ["w3", "w4"], "ranks": [1, 1]}] * 20
    with pytest.raises(ValueError, match="nothing to learn from"):
        run_in(
            tmp_path / "none",
            config.model_copy(
                update={"data": DataSettings(files=(write_rows(tied, "tied.jsonl"),)), "eval_share": 0.0}
            ),
        )
    margin = DataSettings(files=(write_rows([row | {"margin": 3.0} for row in rows], "margin.jsonl"),))
    base = config.model_copy(update={"max_steps": 1, "eval_share": 0.0})
    plain = run_in(tmp_path / "plain", base).metrics["loss"]
    asked = run_in(tmp_path / "margin", base.model_copy(update={"data": margin})).metrics["loss"]
    # A fresh head scores everything zero.
    assert plain == pytest.approx(0.6931, abs=1e-3)
    assert asked == pytest.approx(3.0486, abs=1e-3)
