"""The forward pass of plain decoders over a pack (see `packing`), to the tokens that are asked for and no further.

It computes what the modules of transformers compute, with their weights, in fewer and smaller steps:

- the last layer, from its queries on, only for the tokens whose state is asked for;
- the feed-forward block a few hundred tokens at a time, and in place, so that what lies between its products is still
  in the cache;
- the rotation of queries and keys without the copies that turning them around takes;
- on a small model a few tokens more than there are, so that few numbers of tokens occur: oneDNN generates code for one
  that it has not seen, and takes a millisecond for it at each shape of weights.

Only for architectures that are known to be nothing else (`KINDS`), and whoever uses it has to compare with the model's
own output: a later version of an architecture may do more.
"""

import dataclasses
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steersman.serving.packed_attention import attend_last, attend_segments
from steersman.serving.packing import Pack, pad_pack, round_up

KINDS: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})

# Tokens at a time through norms and feed-forward block.
_CHUNK_TOKENS: Final = 512

# Padding costs at most so many parameters times tokens, 3 ms of a core: less than code for a new number of tokens.
_MAX_PADDING: Final = 2**28


class PackedDecoder:
    """A model without its head, in evaluation mode. It keeps no state: calls may run side by side."""

    def __init__(self, transformer: Any) -> None:
        """`transformer` is a base model of transformers. Raises `ValueError` if it is not of a kind that is known."""
        kind = transformer.config.model_type
        if kind not in KINDS or getattr(transformer.config, "hidden_act", None) not in ("silu", "swish"):
            raise ValueError(f"no forward pass for a {kind}")
        self._embedding: nn.Module = transformer.embed_tokens
        self._rotary: nn.Module = transformer.rotary_emb
        self._layers = list(transformer.layers)
        self._norm: nn.Module = transformer.norm
        num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
        self._max_step = 1 << (_MAX_PADDING // num_parameters).bit_length() >> 1

    def run(self, pack: Pack, device: torch.device, asked: NDArray[np.int64] | None = None) -> Tensor:
        """Last hidden states [rows, hidden size] at the last token of each row of a pack; in inference mode.

        With `asked`, which are places in the pack, at these instead: [asked, hidden size]. Behind those that are meant
        there may be a few rows more, so that few sizes occur.
        """
        pack = pad_pack(pack, round_up(len(pack.token_ids), self._max_step))
        places = pack.last if asked is None else asked
        places = np.pad(places, (0, round_up(len(places), self._max_step) - len(places)))
        if asked is None:
            pack = dataclasses.replace(pack, last=places)
        states = self._embedding(torch.from_numpy(pack.token_ids).to(device, non_blocking=True))
        positions = torch.from_numpy(pack.positions).to(device, non_blocking=True)
        cos, sin = (each[0, :, None] for each in self._rotary(states[None], positions[None]))
        for layer in self._layers[:-1]:
            attended = _attend(layer.self_attn, _normalize(layer.input_layernorm, states), cos, sin, pack)
            states += layer.self_attn.o_proj(attended)
            _feed_forward(layer, states)
        layer, chosen = self._layers[-1], torch.from_numpy(places).to(device)
        normal = _normalize(layer.input_layernorm, states)
        if asked is None:
            attended = _attend(layer.self_attn, normal, cos, sin, pack, chosen)
        else:
            attended = _attend(layer.self_attn, normal, cos, sin, pack).index_select(0, chosen)
        states = states.index_select(0, chosen) + layer.self_attn.o_proj(attended)
        _feed_forward(layer, states)
        return _normalize(self._norm, states)


def _attend(attention: Any, states: Tensor, cos: Tensor, sin: Tensor, pack: Pack, last: Tensor | None = None) -> Tensor:
    """[tokens, heads * size] before the output projection; with `last` only for these tokens: [rows, heads * size]."""
    size = attention.head_dim
    key, value = (layer(states).view(len(states), -1, size) for layer in (attention.k_proj, attention.v_proj))
    asked, cos_asked, sin_asked = (states, cos, sin) if last is None else (states[last], cos[last], sin[last])
    query = attention.q_proj(asked).view(len(asked), -1, size)
    if hasattr(attention, "q_norm"):
        query, key = _normalize(attention.q_norm, query), _normalize(attention.k_norm, key)
    query = _rotate(query, cos_asked, sin_asked).transpose(0, 1)[None]
    key, value = _rotate(key, cos, sin).transpose(0, 1)[None], value.transpose(0, 1)[None]
    attend = attend_segments if last is None else attend_last
    return attend(pack, query, key, value, attention.scaling)[0].flatten(1)


def _rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [tokens, heads, size]; both halves of `cos` and of `sin` [tokens, 1, size] agree."""
    half = vectors.shape[-1] // 2
    first, second = vectors[..., :half], vectors[..., half:]
    rotated = vectors * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


def _feed_forward(layer: Any, states: Tensor) -> None:
    """Adds the block's output to `states` [tokens, hidden size]."""
    for chunk in torch.split(states, _CHUNK_TOKENS):
        normal = _normalize(layer.post_attention_layernorm, chunk)
        gate = nn.functional.silu(layer.mlp.gate_proj(normal), inplace=True)
        chunk += layer.mlp.down_proj(gate.mul_(layer.mlp.up_proj(normal)))


def _normalize(norm: Any, states: Tensor) -> Tensor:
    """RMSNorm over the last dimension, in float32, as the architectures do it."""
    output = torch.empty_like(states)
    for chunk, normal in zip(torch.split(states, _CHUNK_TOKENS), torch.split(output, _CHUNK_TOKENS), strict=True):
        wide = chunk.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(states.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
        torch.mul((wide * scale).to(states.dtype), norm.weight, out=normal)
    return output
