"""The reward model and the items that all servers of a comparison score, and oracles that score them in process.

Items look like those of online RLHF: prompts of conversations, several responses to each, lengths log-normal, 32 to
1,024 tokens together. Every round has the same lengths and fresh token ids, so that no server can remember it.
"""

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, Qwen2Config, Qwen2ForSequenceClassification

from benchmarks import toymodel
from benchmarks.stack import CORES
from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.reward.settings import ModelScorerSettings
from steersman.serving.arrangement import ByPrefix
from steersman.serving.batching import BatchingSettings
from steersman.serving.threads import set_own_threads

Row = NDArray[np.int32]
Score = Callable[[Sequence["Item"]], list[float]]

RESPONSES_PER_PROMPT = 8
SHORTEST, LONGEST = 32, 1024
PROMPT_MEDIAN, PROMPT_SIGMA = 192, 0.6
RESPONSE_MEDIAN, RESPONSE_SIGMA = 96, 0.8


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt and a response, as token ids."""

    prompt: Row
    response: Row

    @property
    def row(self) -> Row:
        """Both, one behind the other."""
        return np.concatenate([self.prompt, self.response])


def save_model(folder: Path, *, quick: bool) -> Path:
    """A Qwen2 sequence classifier of 25 million parameters (0.7 million when quick), random, in bfloat16."""
    torch.manual_seed(0)
    width, layers = (128, 2) if quick else (512, 8)
    config = Qwen2Config(
        vocab_size=toymodel.VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=2 * LONGEST,
        pad_token_id=toymodel.PAD,
        eos_token_id=toymodel.EOS,
        bos_token_id=None,
        initializer_range=0.05,
    )
    config.num_labels = 1
    return toymodel.save(Qwen2ForSequenceClassification(config).bfloat16().eval(), folder)


def draw_items(num_prompts: int, *, seed: int) -> list[Item]:
    """Items in random order. The lengths are the same for every seed, the token ids and the order are not."""
    lengths = random.Random(7)
    tokens = np.random.default_rng(seed)

    def length(median: float, sigma: float) -> int:
        return max(SHORTEST // 2, round(median * math.exp(lengths.gauss(0, sigma))))

    def ids(count: int) -> Row:
        return tokens.integers(toymodel.FIRST_LETTER, toymodel.VOCABULARY, count, dtype=np.int32)

    items = []
    for _ in range(num_prompts):
        prompt = ids(min(length(PROMPT_MEDIAN, PROMPT_SIGMA), LONGEST - SHORTEST // 2))
        for _ in range(RESPONSES_PER_PROMPT):
            response = ids(min(length(RESPONSE_MEDIAN, RESPONSE_SIGMA), LONGEST - len(prompt)))
            items.append(Item(prompt=prompt, response=response))
    random.Random(seed).shuffle(items)
    return items


def describe(items: Sequence[Item]) -> dict[str, float]:
    """How many tokens there are, and how many that are not a prompt for the second time."""
    lengths = [len(item.row) for item in items]
    prompts = {item.prompt.tobytes(): len(item.prompt) for item in items}
    return {
        "items": len(items),
        "tokens": sum(lengths),
        "tokens_with_each_prompt_once": sum(prompts.values()) + sum(len(item.response) for item in items),
        "median_tokens": float(np.median(lengths)),
        "shortest": min(lengths),
        "longest": max(lengths),
    }


class PackedOracle:
    """The service's own engine, called in process with all items at hand: ordered and cut as well as it can be, and as
    many batches side by side as the engine computes best.
    """

    def __init__(self, model: Path) -> None:
        self._engine = TorchScoreEngine.load("model", ModelScorerSettings(model=str(model)))
        if not self._engine.shares_prefixes:
            raise RuntimeError("the engine computes shared prompts for each response: there is no oracle")
        self._settings = BatchingSettings().for_device(self._engine.device_type, self._engine.num_workers)
        self._workers = ThreadPoolExecutor(self._engine.num_workers)

    def __call__(self, items: Sequence[Item]) -> list[float]:
        """Scores in the order of the items."""
        rows = [item.row for item in items]
        arrangement, lengths = ByPrefix[Row](lambda row: row), [len(row) for row in rows]
        batches = arrangement.plan(rows, lengths, self._settings, self._engine.num_workers)
        scores = [0.0] * len(rows)
        found = self._workers.map(lambda batch: self._engine.score([rows[index] for index in batch]), batches)
        for batch, of_batch in zip(batches, found, strict=True):
            for index, score in zip(batch, of_batch, strict=True):
                scores[index] = score
        return scores


class CachedOracle:
    """Transformers as it is: a prompt's keys and values once, then its responses sorted by length, in micro-batches.

    A prompt for each core side by side, on one thread: faster than one prompt after the other on all threads.
    """

    def __init__(self, model: Path) -> None:
        self._model = Qwen2ForSequenceClassification.from_pretrained(model).eval()
        self._workers = ThreadPoolExecutor(CORES, initializer=set_own_threads, initargs=(1,))

    def __call__(self, items: Sequence[Item]) -> list[float]:
        """Scores in the order of the items."""
        groups: dict[bytes, list[int]] = {}
        for index in sorted(range(len(items)), key=lambda index: -len(items[index].response)):
            groups.setdefault(items[index].prompt.tobytes(), []).append(index)
        scores = [0.0] * len(items)
        largest_first = sorted(groups.values(), key=lambda group: -sum(len(items[index].response) for index in group))
        for found in self._workers.map(lambda group: self._score(items, group), largest_first):
            for index, score in found.items():
                scores[index] = score
        return scores

    @torch.inference_mode()
    def _score(self, items: Sequence[Item], group: list[int]) -> dict[int, float]:
        prompt = torch.from_numpy(items[group[0]].prompt.astype(np.int64))[None]
        cache = self._model.model(input_ids=prompt, use_cache=True).past_key_values
        scores: dict[int, float] = {}
        for part in _parts(group, [len(items[index].response) for index in group]):
            scores |= zip(part, self._continue(cache, [items[index] for index in part]), strict=True)
        return scores

    def _continue(self, cache: DynamicCache, items: Sequence[Item]) -> list[float]:
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(items))
        ids = np.full((len(items), len(items[0].response)), toymodel.PAD, np.int64)
        for index, item in enumerate(items):
            ids[index, : len(item.response)] = item.response
        hidden = self._model.model(input_ids=torch.from_numpy(ids), past_key_values=own, use_cache=True)
        last = [len(item.response) - 1 for item in items]
        states = hidden.last_hidden_state[range(len(items)), last].float()
        scores: list[float] = (states @ self._model.score.weight.float()[0]).tolist()
        return scores


def _parts(group: list[int], lengths: list[int]) -> list[list[int]]:
    """Responses of a prompt, longest first, in halves where that saves more padding than a second pass costs."""
    overhead = BatchingSettings().batch_overhead_tokens
    for cut in range(1, len(group)):
        if (lengths[0] - lengths[cut]) * (len(group) - cut) > 2 * overhead:
            return [group[:cut], *_parts(group[cut:], lengths[cut:])]
    return [group]


def requests_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Items in the order given, in requests of `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def as_json(items: Sequence[Item]) -> str:
    """A request to vLLM's /classify, or to the server that takes one sample."""
    return json.dumps({"input": [item.row.tolist() for item in items], "use_activation": False})
