"""The model of these tests, and its tokenizer."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 31  # odd, so that no number of ranks shares it out evenly
EOS = 2
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def write_tokenizer(folder: Path, *, pad: str | None = "<pad>") -> str:
    """A tokenizer of words."""
    words = {"<pad>": 0, "<unk>": 1, "<eos>": EOS} | {f"w{n}": n for n in range(3, VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )
    return str(folder)
