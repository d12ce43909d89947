"""The model, tokenizer and prompts that both sides of a comparison use.

A Qwen2 of 3.4 million parameters with random weights. Its chance to end a response is set, not learned: coordinate 0
of every token embedding holds the same constant, and the end-of-sequence row of the (tied) output head alone reads
that coordinate strongly, which adds nearly the same amount to its logit in every context. The amount is found by
bisection on the mean length that sampling would give.
"""

import copy
import json
import random
import string
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Tokenizer

VOCABULARY: Final = 2048
PROMPT_TOKENS: Final = 32
PAD, EOS, FIRST_LETTER = 0, 1, 2
# Beside embeddings of standard deviation 0.02: clearly there after the norm, without drowning the rest.
_CONSTANT: Final = 0.3
_NEVER: Final = -15.0


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a letter. (`AutoTokenizer` reads this class for every Qwen2 model, whatever was saved.)"""
    words = ["<pad>", "<eos>", *string.ascii_letters]
    words += [f"<{index}>" for index in range(len(words), VOCABULARY)]
    return Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token="<pad>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )


def build_prompts(count: int, num_tokens: int, *, seed: int) -> list[str]:
    """`count` texts of `num_tokens` random letters, which are as many tokens."""
    draw = random.Random(seed)
    return ["".join(draw.choices(string.ascii_letters, k=num_tokens)) for _ in range(count)]


def encode(prompts: list[str]) -> list[list[int]]:
    """Token ids of texts that `build_prompts` made."""
    ids = {letter: index for index, letter in enumerate(string.ascii_letters, start=FIRST_LETTER)}
    return [[ids[letter] for letter in prompt] for prompt in prompts]


def build_policy(*, seed: int, mean_tokens: float | None, limit: int, max_positions: int = 256) -> Qwen2ForCausalLM:
    """The causal LM: responses of `mean_tokens` on average when cut at `limit`, or that never end if it is None."""
    torch.manual_seed(seed)
    model: Qwen2ForCausalLM = Qwen2ForCausalLM(_config(max_positions)).eval()
    # The draw of the library is N(0, 0.02^2) whatever its version: the same file of weights serves both sides.
    weights = model.model.embed_tokens.weight.data
    weights[:, 0] = _CONSTANT
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[0] = 0
        layer.mlp.down_proj.weight.data[0] = 0
    weights[[PAD, EOS]] = 0
    weights[PAD, 0] = _NEVER  # padding is never drawn: it would end a response for some, and not for others
    if mean_tokens is None:
        weights[EOS, 0] = _NEVER
        return model
    # What follows a prompt under random weights is close to random tokens; their hidden states do not depend on
    # the row that is sought, because end-of-sequence is not among them.
    with torch.no_grad():
        ids_BT = torch.randint(FIRST_LETTER, VOCABULARY, (64, PROMPT_TOKENS + limit))
        states_BTD = model.model(input_ids=ids_BT).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]
        others_BT = model.lm_head(states_BTD)[..., FIRST_LETTER:].logsumexp(-1)
    low, high = 0.0, 32.0
    for _ in range(40):
        middle = (low + high) / 2
        chance_BT = torch.sigmoid(states_BTD[..., 0] * middle - others_BT)
        low, high = (middle, high) if expected_length(chance_BT) > mean_tokens else (low, middle)
    weights[EOS, 0] = (low + high) / 2
    return model


def build_scalar_model(policy: Qwen2ForCausalLM, *, seed: int) -> Qwen2ForSequenceClassification:
    """A reward model on the policy's backbone, with a random head."""
    torch.manual_seed(seed)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model: Qwen2ForSequenceClassification = Qwen2ForSequenceClassification(config).eval()
    model.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=0.02)
    return model


def expected_length(end_probability_BT: Tensor) -> float:
    """Mean length of responses that end with these chances at each token, and after the last one at any rate."""
    alive_BT = (1 - end_probability_BT[:, :-1]).cumprod(1)
    return float(1 + alive_BT.sum(1).mean())


def save(model: Any, folder: Path) -> Path:
    """Writes the model and the tokenizer to `folder` as Hugging Face files."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_prompts(path: Path, prompts: list[str]) -> Path:
    """Writes one `{"prompt": "..."}` a line."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path


def _config(max_positions: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        dtype="float32",
    )
