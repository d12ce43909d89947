"""What a short PPO job on a tiny model needs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
NUM_PROMPTS, NUM_SAMPLES = 16, 2


def save_model(folder: Path) -> None:
    """A random Llama, and in a folder of its own a tokenizer of words."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        tokenizer_of(folder)
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def tokenizer_of(model: Path) -> Path:
    """Where the tokenizer of a model is."""
    return model / "tokenizer"


def settings(model: Path, folder: Path, services: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Of a job over 16 prompts, two samples each, that writes its prompts to `folder`."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1} w5"}) + "\n" for n in range(10, 42)))
    return {
        "actor": {"path": str(model)},
        "tokenizer": str(tokenizer_of(model)),
        "prompts": {"files": [str(prompts)]},
        "max_prompt_tokens": 16,
        "services": {"give_up_seconds": 120, "push_encoding": "delta", **services},
        "sampling": {"max_tokens": 12, "samples_per_prompt": NUM_SAMPLES},
        "prompts_per_step": NUM_PROMPTS,
        "total_steps": 8,
        "optimizer": {"learning_rate": 8e-3, "schedule": "constant"},
        "critic_optimizer": {"learning_rate": 8e-3, "schedule": "constant"},
        "kl": {"coefficient": 0.01},
        "device": "cpu",
        "num_threads": 1,
    } | changes
