"""Config, sources, tokenizers, statistics and the run folder."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from examples.demo import language
from examples.steps import tokenizer_files
from examples.steps.command import ROOT, new_directory
from examples.steps.config import ComparisonSource, ConfigError, PipelineConfig, load_config, merged
from examples.steps.sources import prepare, prompt_of
from examples.steps.statistics import mean, win_rate

from steersman.trainer.data.load import load_comparisons, load_demonstrations
from steersman.trainer.data.settings import DataSettings
from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import STAGES


@pytest.mark.parametrize("name", ["demo.yaml", "hh_rlhf.yaml"])
def test_the_stages_take_the_settings_of_the_examples(name: str) -> None:
    config = load_config(ROOT / "examples" / name, [])
    known: dict[JobKind, dict[str, Any]] = {
        JobKind.SFT: {"model": {"config": config.model}, "tokenizer": "t", "data": {"files": ["f"]}},
        JobKind.REWARD_MODEL: {"model": {"path": "p"}, "data": {"files": ["f"]}, "eval_data": {"files": ["g"]}},
        JobKind.PPO: {"actor": {"path": "p"}, "critic": {"path": "c"}, "prompts": {"files": ["f"]}},
    }
    given = {JobKind.SFT: config.sft, JobKind.REWARD_MODEL: config.reward_model, JobKind.PPO: config.ppo}
    for kind, stage in STAGES.items():
        stage.load_config_class().model_validate(merged(known[kind], given[kind]))
        assert callable(stage.load_run())


def test_changes_reach_their_key_and_bad_ones_are_named(tmp_path: Path) -> None:
    demo = ROOT / "examples" / "demo.yaml"
    config = load_config(demo, ["ppo.total_steps=7", "ppo.kl.coefficient=0.5", "seed=3"])
    assert (config.ppo["total_steps"], config.ppo["kl"]["coefficient"], config.seed) == (7, 0.5, 3)
    for change in ("seed", "sead=3", "source.num_comparisons=0", "seed.deep=1"):
        with pytest.raises(ConfigError, match=change.partition("=")[0].partition(".")[0]):
            load_config(demo, [change])
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml", [])
    hh = load_config(ROOT / "examples" / "hh_rlhf.yaml", [], data=Path("a.jsonl"))
    assert isinstance(hh.source, ComparisonSource)
    assert hh.source.path == Path("a.jsonl")


def test_merging_keeps_what_the_second_does_not_say() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "e": 4}) == {"a": {"b": 9, "c": 2}, "d": 3, "e": 4}


def test_the_language_becomes_files_that_the_stages_read(tmp_path: Path) -> None:
    config = load_config(ROOT / "examples" / "demo.yaml", ["source.num_demonstrations=50"])
    data = prepare(config, tmp_path / "data")
    records, _ = load_demonstrations(DataSettings(files=(str(data.demonstrations),)))
    assert len(records) == 50
    assert data.gold is not None
    assert data.comparisons is None
    assert not set(data.train_prompts) & set(data.held_out_prompts)


def comparison_config(path: Path) -> PipelineConfig:
    return load_config(ROOT / "examples" / "hh_rlhf.yaml", ["source.held_out_share=0.25"], data=path)


def test_comparisons_are_split_by_prompt(tmp_path: Path) -> None:
    rows = [
        {
            "chosen": f"\n\nHuman: question {n % 8}\n\nAssistant: good {n}",
            "rejected": f"\n\nHuman: question {n % 8}\n\nAssistant: bad\u2028{n}",
        }
        for n in range(16)
    ]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()))
    data = prepare(comparison_config(path), tmp_path / "data")
    assert data.comparisons is not None
    train, held_out = (load_comparisons(DataSettings(files=(str(file),)))[0] for file in data.comparisons)
    assert (len(train), len(held_out)) == (12, 4)
    assert len(data.held_out_prompts) == 2
    assert not {str(record.prompt) for record in train} & {str(record.prompt) for record in held_out}
    assert data.held_out_prompts[0].endswith("\n\nAssistant:")


def test_bad_comparisons_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "x"}\n{"chosen": "y"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
        prepare(comparison_config(path), tmp_path / "data")
    with pytest.raises(ValueError, match="assistant"):
        prompt_of("\n\nHuman: alone")


def test_tokenizers_read_back_as_they_were_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = language.vocabulary()
    size = tokenizer_files.save_word_level(tmp_path / "words", words)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "words")
    text = "of course ! the red lamp is in the kitchen ."
    assert size == len(words) + 3
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token_id not in tokenizer(" ".join(words))["input_ids"]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")

    tokenizer_files.save_byte_level(tmp_path / "bytes", ["so it goes, so it goes"] * 9, vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bytes")
    for text in ("so it goes", "\n\nHuman: é 漢字 \u2028 \x00", "  two  spaces"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_win_rates_count_ties_half_and_know_their_doubt() -> None:
    rate = win_rate([1.0] * 150 + [0.0] * 50, [0.0] * 150 + [0.0] * 50)
    assert (rate.value, rate.num) == (0.875, 200)
    assert 0.82 < rate.low < 0.875 < rate.high < 0.92
    assert win_rate([1.0] * 10, [0.0] * 10).high == pytest.approx(1.0)
    # Wilson's interval of 8 of 10, from the formula's own paper form.
    eight = win_rate([1.0] * 8 + [0.0] * 2, [0.5] * 10)
    assert (eight.low, eight.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_means_have_the_normal_interval() -> None:
    estimate = mean([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3 / 4)
    assert (estimate.value, estimate.high - estimate.value) == (2.5, pytest.approx(half))
    assert mean([3.0]).low == 3.0


def test_a_run_never_overwrites_another(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "demo"
    assert [new_directory(wanted).name for _ in range(3)] == ["demo", "demo-2", "demo-3"]
