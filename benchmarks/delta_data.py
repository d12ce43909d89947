"""Weights before and after real AdamW steps, and what information theory says about the difference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.wire.weights.steps import integers, steps_between

BATCH, TOKENS = 4, 64
BETAS = (0.9, 0.95)
STEADY_STEPS = 24
"""By then the moments (half-lives 7 and 14 steps) have forgotten the first step, which moves every weight in full."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One tensor, flat raw bfloat16, before and after a step."""

    name: str
    base: NDArray[np.uint16]
    new: NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """What a step changed, and bytes that no code can beat that takes changes as independent of each other.

    Attributes:
        num_elements: of the model.
        num_changes: elements of which any bit differs.
        flat_bytes: with one density for all positions, and one distribution for all steps.
        context_bytes: with those of each exponent of the old value.
    """

    num_elements: int
    num_changes: int
    flat_bytes: float
    context_bytes: float


def adamw_steps(learning_rate: float, *, steps: Sequence[int], quick: bool) -> dict[int, list[Pair]]:
    """Pairs of the steps with these numbers (from 1): a random decoder, float32 masters, weights as served.

    55M weights, 0.1M when quick. Tokens are drawn with the frequencies of words (Zipf), so that embeddings see
    gradients as uneven as in practice.
    """
    torch.manual_seed(0)
    width, hidden, vocabulary, layers = (64, 128, 512, 1) if quick else (1024, 2816, 16_384, 3)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=hidden,
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=0.01)
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    found = {}
    for step in range(1, max(steps) + 1):
        before = _served(model) if step in steps else {}
        tokens = torch.multinomial(frequencies, BATCH * TOKENS, replacement=True).view(BATCH, TOKENS)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            after = _served(model)
            found[step] = [Pair(name=name, base=before[name], new=after[name]) for name in after]
    return found


def _served(model: torch.nn.Module) -> dict[str, NDArray[np.uint16]]:
    return {
        name: parameter.detach().bfloat16().flatten().view(torch.int16).numpy().view(np.uint16).copy()
        for name, parameter in model.named_parameters()
    }


def entropy_of(pairs: Sequence[Pair]) -> Entropy:
    """The empirical entropies of a step over all tensors together."""
    elements = np.zeros(256, np.int64)
    changes: list[NDArray[np.int64]] = []
    exponents: list[NDArray[np.int64]] = []
    for pair in pairs:
        exponent = (pair.base >> 7 & 0xFF).astype(np.int64)
        elements += np.bincount(exponent, minlength=256)
        changed = np.flatnonzero(pair.base != pair.new)
        exponents.append(exponent[changed])
        moves = steps_between(integers(pair.base[changed]), integers(pair.new[changed]))
        changes.append(moves.astype(np.int64))
    all_changes, all_exponents = np.concatenate(changes), np.concatenate(exponents)
    by_context = sum(
        _bits(int(elements[exponent]), all_changes[all_exponents == exponent]) for exponent in np.unique(all_exponents)
    )
    return Entropy(
        num_elements=int(elements.sum()),
        num_changes=all_changes.size,
        flat_bytes=_bits(int(elements.sum()), all_changes) / 8,
        context_bytes=by_context / 8,
    )


def _bits(num_elements: int, changes: NDArray[np.int64]) -> float:
    positions = num_elements * _entropy_bits(np.array([changes.size, num_elements - changes.size]))
    return positions + changes.size * _entropy_bits(np.unique(changes, return_counts=True)[1])


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
