"""Which tokenizer a checkpoint means."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from steersman.serving.tokenization import trusted

WORDS = {"<pad>": 0, "<eos>": 1, "up": 2, "down": 3}


@pytest.fixture
def written(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, and its files in `tmp_path`."""
    raw = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    return tokenizer


def test_a_tokenizer_that_agrees_with_its_file_stays(written: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert trusted(found, tmp_path) is found


def test_truncation_left_in_the_file_is_no_difference(written: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(2)
    stored.save(str(tmp_path / "tokenizer.json"))
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert trusted(found, tmp_path) is found


def test_a_checkpoint_without_the_file_keeps_what_was_found(written: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert trusted(written, tmp_path / "elsewhere") is written


def test_the_file_wins_over_the_class_of_the_architecture(
    written: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Qwen2Config().save_pretrained(tmp_path)
    forced = AutoTokenizer.from_pretrained(tmp_path)
    assert forced.encode("up down up") != [2, 3, 2]  # else there is nothing to mend, and the module can go
    tokenizer = trusted(forced, tmp_path)
    assert tokenizer.encode("up down up") == [2, 3, 2]
    assert tokenizer.decode([2, 3]) == "up down"
    assert tokenizer.eos_token_id == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "down"}], tokenize=False)
    assert chat == "down "
    assert "is read instead of" in caplog.text
