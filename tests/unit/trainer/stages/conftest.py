import json
import random

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from steersman.trainer.checkpoint.source import ModelSource

WORDS = ["<pad>", "<eos>", "<unk>", "Human", "Assistant", ":", *(f"w{n}" for n in range(26))]


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> str:
    """A folder with a tokenizer of 32 words."""
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_model() -> ModelSource:
    return ModelSource(
        config={
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        }
    )


@pytest.fixture
def write_rows(tmp_path):
    def write(rows, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def words():
    """Random texts of given words, the same each time."""
    generator = random.Random(5)
    return lambda vocabulary, low, high: " ".join(generator.choices(vocabulary, k=generator.randint(low, high)))
