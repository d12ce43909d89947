"""Attention over a pack of rows (see `packing`), for causal models of transformers whose attention can be exchanged.

All else in such a model works on each token by itself, so a pack goes through it as one sequence: no padding, and a
common beginning once. Models whose tokens influence each other in further ways (recurrent, sliding windows, position
biases) must not be used with it: `packed` and `attend` refuse those that say so, and a caller has to compare with the
model's own scores for the rest. Outside of `run_pack` a prepared model computes as with transformers' SDPA attention.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from steersman.serving import linear
from steersman.serving.packing import Pack, Segment

ATTENTION: Final = "steersman_packed"

# Queries at a time: what lies behind them in their segment is left out, within the chunk it is masked.
_CHUNK_TOKENS: Final = 256

# The same where attention is two matrix products: their scores stay in the cache.
_PRODUCT_CHUNK_TOKENS: Final = 128

# What transformers hands to an attention that is more than plain causal attention.
_BEYOND: Final = ("sliding_window", "softcap", "s_aux", "position_bias", "attention_chunk_size", "cache")

_PACK: ContextVar[Pack | None] = ContextVar("pack", default=None)


class NotPackableError(Exception):
    """The model does more than plain causal attention."""


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Gives `model`, a `PreTrainedModel`, this attention; takes it away again if the block raises."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        if model.config._attn_implementation != ATTENTION:
            raise NotPackableError(f"the attention of {type(model).__name__} cannot be exchanged")
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise NotPackableError(f"{type(model).__name__} has layers of {', '.join(sorted(kinds))}")
        yield
    except BaseException:
        model.set_attn_implementation(before)
        raise


def run_pack(transformer: Any, pack: Pack, device: torch.device) -> Tensor:
    """Last hidden states [tokens, hidden size] of a pack, by a model that `packed` has prepared."""
    input_ids = torch.from_numpy(pack.token_ids).to(device, non_blocking=True)
    positions = torch.from_numpy(pack.positions).to(device, non_blocking=True)
    token = _PACK.set(pack)
    try:
        output = transformer(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
    finally:
        _PACK.reset(token)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of a layer: query [1, heads, tokens, size], key and value [1, key heads, tokens, size].

    Returns [1, tokens, heads, size], as transformers wants it. Raises `NotPackableError` for what it cannot do.
    """
    pack = _PACK.get()
    if pack is None:
        more |= {"scaling": scaling, "is_causal": is_causal}
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return plain
    beyond = [name for name in _BEYOND if more.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if beyond or not causal or attention_mask is not None or query.shape[2] != key.shape[2]:
        raise NotPackableError(f"not plain causal attention: {', '.join(beyond) or 'a mask or a cache'}")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return attend_segments(pack, query, key, value, scale), None


def attend_segments(pack: Pack, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of all tokens of a pack; shapes as for `attend`."""
    if query.device.type != "cpu" and key.shape[1] != query.shape[1]:
        # With grouped heads and a mask accelerators would take their slowest kernel.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    by_products = query.dtype == torch.bfloat16 and query.device.type == "cpu" and _has_fast_products()
    attend_segment = _attend_by_products if by_products else _attend_segment
    for segment in pack.segments:
        attend_segment(segment, query, key, value, scale, output)
    return output


def attend_last(pack: Pack, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of the last tokens of the rows alone: query [1, heads, rows, size], key and value for all tokens.

    Returns [1, rows, heads, size].
    """
    num_groups = query.shape[1] // key.shape[1]
    grouped = query[0].view(key.shape[1], num_groups, *query.shape[2:])
    outputs = []
    for index, spans in enumerate(pack.row_spans()):
        keys = torch.cat([key[0, :, start:stop] for start, stop in spans], 1)
        values = torch.cat([value[0, :, start:stop] for start, stop in spans], 1)
        scores = torch.bmm(grouped[:, :, index], keys.transpose(1, 2)).float().mul_(scale)
        weights = torch.softmax(scores, -1).to(query.dtype)
        outputs.append(torch.bmm(weights, values).flatten(0, 1))
    return torch.stack(outputs)[None]


def _attend_segment(segment: Segment, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor) -> None:
    attention = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )
    own = slice(segment.start, segment.stop)
    if not segment.before:
        result = attention(query[:, :, own], key[:, :, own], value[:, :, own], is_causal=True)
        output[:, own] = result.transpose(1, 2)
        return
    spans = [*segment.before, (segment.start, segment.stop)]
    keys = torch.cat([key[:, :, start:stop] for start, stop in spans], 2)
    values = torch.cat([value[:, :, start:stop] for start, stop in spans], 2)
    num_before = sum(stop - start for start, stop in segment.before)
    for start in range(segment.start, segment.stop, _CHUNK_TOKENS):
        stop = min(segment.stop, start + _CHUNK_TOKENS)
        seen = num_before + stop - segment.start
        mask = _mask(stop - start, seen, query.dtype, query.device)
        result = attention(query[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], attn_mask=mask)
        output[:, start:stop] = result.transpose(1, 2)


def _attend_by_products(
    segment: Segment, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor
) -> None:
    """The same in bfloat16 on a CPU, by oneDNN's matrix products: twice as fast as torch's attention kernel there.

    The softmax is in float32, its result in bfloat16, as in transformers' own eager attention. The queries of all heads
    that share a key head go through one product.
    """
    spans = [*segment.before, (segment.start, segment.stop)]
    keys = torch.cat([key[0, :, start:stop] for start, stop in spans], 1)
    values = torch.cat([value[0, :, start:stop] for start, stop in spans], 1)
    num_before = sum(stop - start for start, stop in segment.before)
    num_groups = query.shape[1] // key.shape[1]
    for start in range(segment.start, segment.stop, _PRODUCT_CHUNK_TOKENS):
        stop = min(segment.stop, start + _PRODUCT_CHUNK_TOKENS)
        count, seen = stop - start, num_before + stop - segment.start
        chunk = query[0, :, start:stop].reshape(key.shape[1], num_groups * count, query.shape[3])
        scores = torch.bmm(chunk, keys[:, :seen].transpose(1, 2)).float().mul_(scale)
        own = scores.view(key.shape[1], num_groups, count, seen)[..., seen - count :]
        own += _mask(count, count, torch.float32, query.device)
        weights = torch.softmax(scores, -1).to(query.dtype)
        result = torch.bmm(weights, values[:, :seen]).view(query.shape[1], count, value.shape[3])
        output[0, start:stop] = result.transpose(0, 1)


@functools.cache
def _has_fast_products() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU; torch's own product would be slow."""
    return linear.available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[queries, keys]: the last query sees all keys, each one before it one fewer."""
    longest = max(_CHUNK_TOKENS, 1 << (num_keys - 1).bit_length())
    return _whole_mask(longest, dtype, device)[_CHUNK_TOKENS - num_queries :, longest - num_keys :]


@functools.lru_cache(maxsize=4)
def _whole_mask(num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    hidden = torch.ones(_CHUNK_TOKENS, num_keys, dtype=torch.bool, device=device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(
        hidden.triu(num_keys - _CHUNK_TOKENS + 1), float("-inf")
    )


def _make_mask(*arguments: Any, **named: Any) -> Tensor | None:
    """Packs need no mask from transformers."""
    return sdpa_mask(*arguments, **named) if _PACK.get() is None else None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _make_mask)
