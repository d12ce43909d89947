import json
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from steersman.trainer.checkpoint.models import load_actor, load_tokenizer, save_model
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.data.settings import DataSettings
from steersman.trainer.stages import reward_normalization
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


@pytest.mark.parametrize(("reference", "names"), [("chosen", ["chosen"]), ("all", ["chosen", "rejected"])])
def test_the_scale_of_the_scores_lies_beside_the_model(config, tmp_path, rows, reference, names):
    changed = config.model_copy(update={"eval_share": 0.0, "max_steps": 5, "normalize_on": reference})
    result = run_in(tmp_path / "run", changed)
    saved = json.loads((result.model_directory / "reward_normalization.json").read_text())
    scores = served_scores(result.model_directory, [f"{row['prompt']} {row[name]}" for row in rows for name in names])
    assert saved["mean"] == pytest.approx(float(scores.mean()), abs=1e-4)
    assert saved["std"] == pytest.approx(float(scores.std(unbiased=False)), abs=1e-4)
    assert saved["num_responses"] == len(scores)
    assert saved["reference"].endswith(f"of {len(rows)} training comparisons")
    assert (result.metrics["reward_mean"], result.metrics["reward_std"]) == (saved["mean"], saved["std"])
    # The manifest vouches for it as for the rest.
    assert "reward_normalization.json" in json.loads((result.model_directory / "manifest.json").read_text())["files"]


def test_without_a_scale_there_is_no_file(config, tmp_path):
    changed = config.model_copy(update={"max_steps": 1, "normalize_on": "none"})
    result = run_in(tmp_path / "run", changed)
    assert not (result.model_directory / "reward_normalization.json").exists()
    saved = json.loads((result.model_directory / "config.json").read_text())
    assert saved["pad_token_id"] == 0
    assert saved["reward_encoding"] == "continuation"


def test_a_reference_set_is_spread_over_all_records():
    assert reward_normalization.evenly(3) == [0, 1, 2]
    assert reward_normalization.evenly(10, 4) == [0, 2, 5, 7]
    assert reward_normalization.evenly(0) == []


def test_scores_that_are_all_the_same_give_no_scale():
    assert reward_normalization.fit(torch.full((3,), 2.0), "r") is None
    assert reward_normalization.fit(torch.tensor([1.0, 3.0]), "r") == {
        "version": 1,
        "mean": 2.0,
        "std": 1.0,
        "num_responses": 2,
        "reference": "r",
    }


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


def test_the_evaluation_tells_subsets_lengths_and_annotators_apart(config, tmp_path, write_rows, words):
    """The annotator who follows the rule is agreed with, the one who does the opposite is not."""
    train = [{"prompt": "w1", "chosen": f"{words(PLAIN, 1, 3)} w3", "rejected": f"{words(PLAIN, 1, 3)} w4"}] * 1
    train += [
        {"prompt": "w1", "chosen": f"{words(PLAIN, 1, 4)} w3", "rejected": f"{words(PLAIN, 1, 4)} w4"}
        for _ in range(99)
    ]
    judged = []
    for number in range(30):
        good, bad = f"{words(PLAIN, 1, 3)} w3", f"{words(PLAIN, 4, 6)} w4"
        subset = "easy" if number % 3 else "hard"
        judged.append({"prompt": "w2", "chosen": good, "rejected": bad, "subset": subset, "annotator": "fair"})
        judged.append({"prompt": "w2", "chosen": bad, "rejected": good, "subset": subset, "annotator": 7})
    settings = {
        "data": DataSettings(files=(write_rows(train, "train.jsonl"),)),
        "eval_data": DataSettings(files=(write_rows(judged, "judged.jsonl"),)),
        "eval_share": 0.0,
    }
    metrics = run_in(tmp_path / "run", config.model_copy(update=settings)).metrics
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert metrics["eval/num_pairs"] == table["overall"]["num_pairs"] == 60
    assert metrics["eval/accuracy"] == table["overall"]["value"] == pytest.approx(0.5)
    assert table["annotators"]["fair"]["value"] > 0.9
    assert table["annotators"]["7"]["value"] < 0.1
    assert (table["agreement"]["value"], table["agreement"]["num_pairs"]) == (0.0, 30)
    assert {name: one["num_pairs"] for name, one in table["subsets"].items()} == {"easy": 40, "hard": 20}
    assert table["lengths"]["preferred_shorter"]["value"] == pytest.approx(table["annotators"]["fair"]["value"])
    assert metrics["eval/preferred_longer/accuracy"] == table["lengths"]["preferred_longer"]["value"]
    # As sure of the wrong ones as of the right ones.
    assert metrics["eval/calibration_error"] == pytest.approx(
        sum(
            one["accuracy"]["num_pairs"] * (one["mean_confidence"] - one["accuracy"]["value"])
            for one in table["calibration"]
        )
        / 60,
        abs=1e-6,
    )


def test_balanced_lengths_show_the_rarer_side_again(config, tmp_path, write_rows, words):
    longer = [{"prompt": "w1", "chosen": "w3 w5 w6", "rejected": "w4"} for _ in range(30)]
    shorter = [{"prompt": "w1", "chosen": "w3", "rejected": "w4 w5 w6"} for _ in range(6)]
    alike = [{"prompt": "w1", "chosen": "w3", "rejected": "w4"} for _ in range(4)]
    data = DataSettings(files=(write_rows(longer + shorter + alike, "lengths.jsonl"),))
    changed = config.model_copy(update={"data": data, "eval_share": 0.0, "max_steps": None, "batch_size": 8})
    plain = run_in(tmp_path / "plain", changed)
    balanced = run_in(tmp_path / "balanced", changed.model_copy(update={"balance_lengths": True}))
    assert plain.total_steps == 40 // 8
    assert balanced.total_steps == (30 + 30 + 4) // 8


def test_the_scores_that_training_ended_with_are_kept(config, tmp_path):
    result = run_in(tmp_path / "run", config.model_copy(update={"max_steps": 3}))
    written = json.loads((tmp_path / "run" / "scores.json").read_text())
    items = written["items"]
    assert (len(items), written["dtype"]) == (32, "float32")
    model = AutoModelForSequenceClassification.from_pretrained(result.model_directory)
    for item in items:
        with torch.no_grad():
            score = model(input_ids=torch.tensor([[*item["prompt"], *item["response"]]])).logits
        assert float(score) == pytest.approx(item["raw_score"], abs=1e-4)
