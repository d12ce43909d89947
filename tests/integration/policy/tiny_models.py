"""Tiny random models as checkpoints."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB_SIZE = 320
EOS_TOKEN_ID = 2


def save_model(kind: str, folder: Path, seed: int) -> PreTrainedModel:
    """A "qwen2" with tied embeddings or a "llama" with untied ones, in float32. Wide weights, so that models with
    different seeds disagree about everything.
    """
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        "initializer_range": 0.2,
    }
    model: PreTrainedModel
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of words "w0" to "w319" with a chat template: "w3 CONTENT" for a turn, then "w4"."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{index}": index for index in range(3, VOCAB_SIZE)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message.role != 'user' %}{{ raise_exception('users only') }}{% endif %}"
        "w3 {{ message.content }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
