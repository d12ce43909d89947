"""Named scorers in the settings: what is accepted and how what is not is named."""

import json

import pytest

from steersman.reward.build import choose_encoding
from steersman.reward.settings import FunctionScorerSettings, ModelScorerSettings, RewardSettings
from steersman.serving.settings import SettingsError


def load(*flags: str) -> RewardSettings:
    return RewardSettings.load(flags)


def test_scorers_of_both_kinds_from_a_file(tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text(
        "scorers:\n"
        "  quality: {model: /models/q, dtype: bfloat16, batching: {max_batch_tokens: 99}}\n"
        '  length: {function: "rules:length", timeout_seconds: 5}\n'
        "default_scorer: length\n"
    )
    settings = load("--config", str(path))
    named = settings.named_scorers()
    assert list(named) == ["quality", "length"]
    assert isinstance(named["quality"], ModelScorerSettings)
    assert named["quality"].batching.max_batch_tokens == 99
    assert isinstance(named["length"], FunctionScorerSettings)
    assert named["length"].timeout_seconds == 5
    assert settings.default_scorer == "length"


def test_one_scorer_by_flag():
    assert load("--model", "/models/q").named_scorers() == {"reward": ModelScorerSettings(model="/models/q")}
    assert load("--function", "m:f").named_scorers() == {"reward": FunctionScorerSettings(function="m:f")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "scorers: given by nothing, allowed: exactly one of"),
        (["--model", "q", "--function", "m:f"], "allowed: exactly one of scorers, model, function"),
        (["--model", "q", "--default-scorer", "x"], "default_scorer: is 'x', allowed: reward"),
        (["--scorers", json.dumps({"a": {"modell": "q"}})], r"scorers\.a\.model\.modell: no such setting"),
        (["--scorers", json.dumps({"a": {"function": "f"}})], r"scorers\.a\.function\.function: is 'f'"),
        (["--scorers", json.dumps({"a": {"function": "m:f", "dtype": "auto"}})], r"dtype: no such setting"),
        (["--scorers", json.dumps({"a": {"model": "q", "dtype": "int8"}})], r"dtype: is 'int8'"),
        (["--scorers", json.dumps({"": {"model": "q"}})], "scorers: has an empty name"),
        (
            ["--scorers", json.dumps({"a": {"model": "q"}, "e": {"ensemble": ["a", "b"]}})],
            r"scorers\.e\.ensemble: has 'b', allowed: a",
        ),
        (
            ["--scorers", json.dumps({"a": {"model": "q"}, "e": {"ensemble": ["a", "e"]}})],
            r"scorers\.e\.ensemble: has 'e', allowed: a",
        ),
        (["--scorers", json.dumps({"a": {"ensemble": ["b"]}})], r"scorers\.a\.ensemble\.ensemble: is \['b'\]"),
        (
            ["--scorers", json.dumps({"a": {"function": "m:f", "length_penalty": {"per_token": 1}}})],
            "length_penalty: needs a tokenizer",
        ),
        (
            ["--scorers", json.dumps({"a": {"model": "q", "length_penalty": {"per_token": 0}}})],
            r"scorers\.a\.model\.length_penalty\.per_token: is 0",
        ),
        (["--model", "q", "--models.max-models", "0"], r"models\.max_models: is '0'"),
    ],
)
def test_bad_settings_are_named(flags, message):
    with pytest.raises(SettingsError, match=message):
        load(*flags)


@pytest.mark.parametrize(
    ("setting", "of_model", "chosen"),
    [
        ("auto", None, "template"),
        ("auto", "continuation", "continuation"),
        ("template", "continuation", "template"),
        ("continuation", None, "continuation"),
    ],
)
def test_the_encoding_is_that_of_the_settings_then_of_the_model(setting, of_model, chosen):
    assert choose_encoding(ModelScorerSettings(model="q", encoding=setting), of_model) == chosen


def test_an_unknown_encoding_of_a_model_is_named():
    with pytest.raises(ValueError, match="reward_encoding is 'morse', allowed: template, continuation"):
        choose_encoding(ModelScorerSettings(model="q"), "morse")
