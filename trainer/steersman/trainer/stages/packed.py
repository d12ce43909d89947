"""Training without padding: rows one behind the other as one sequence, through the layers of plain decoders.

`let_pack` gives the layers of a model a second way to compute, for packs; they stay what they were in all other
respects (names, weights, sharding, what is saved), and calls without a pack go the model's own way. A model of another
architecture is left alone and trains on padded rows: `states_at` takes either.

In the last layer only the tokens whose state is asked for have a query and a feed-forward block: what they give
elsewhere reaches no other token, and most of a batch are prompts.

A pack of a small model on a CPU gets a few tokens of filling, a row of its own, so that few numbers of tokens occur:
oneDNN generates code for each one that it has not seen, and takes about a millisecond for it at each shape of weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steersman.serving.packed_decoder import KINDS
from steersman.serving.packing import round_up
from steersman.trainer.algorithm.decoder_blocks import feed_forward, project
from steersman.trainer.algorithm.packed_attention import Heads, Pack, attend
from steersman.trainer.stages.linear import OneDnnLinear
from steersman.trainer.stages.padded import hidden_states_at

_log = logging.getLogger(__name__)

# A block of rows more costs about as much as so much padding inside of attention.
_CPU_BLOCK_PADDING: Final = 128
# Parameters times tokens of filling: 16 ms of a core forwards and backwards, for a dozen shapes of weights.
_MAX_FILLING: Final = 2**28
_PARTS: Final = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of tokens ready for a model: packed into one row of `ids_BT`, or each in a row of its own, padded on the
    right. `starts_B` are the flat places in `ids_BT` of each row's first token, `lengths` the tokens of each row. What
    a pack has beyond them is filling.
    """

    ids_BT: Tensor  # noqa: N815
    starts_B: tuple[int, ...]  # noqa: N815
    lengths: tuple[int, ...]
    pack: Pack | None = None
    step: int = 1

    def rounded(self, positions_P: Tensor) -> Tensor:
        """`positions_P` and, where sizes are to be few, some more at the end: filling, whose states nobody needs."""
        # With a step there is filling, and it is last. It can be asked for often: its gradient is zero.
        more = round_up(len(positions_P), self.step) - len(positions_P)
        return torch.cat([positions_P, positions_P.new_full((more,), self.ids_BT.shape[1] - 1)])


def packing_step(*models: PreTrainedModel) -> int | None:
    """Numbers of tokens of a pack are to be rounded up to multiples of it, 1 for any. None if not all of the models can
    pack, for want of `let_pack` or because it did not know them.
    """
    layers = [layer for model in models for layer in getattr(model.base_model, "layers", (None,))]
    if not all(isinstance(layer, _PackedLayer) for layer in layers):
        return None
    parameters = [parameter for model in models for parameter in model.parameters()]
    if parameters[0].device.type != "cpu":
        return 1
    largest = max(sum(parameter.numel() for parameter in model.parameters()) for model in models)
    return max(1, 1 << (_MAX_FILLING // largest).bit_length() >> 1)


def batch_of(rows: Sequence[Tensor | Sequence[int]], device: torch.device, *, step: int | None) -> TokenBatch:
    """The batch of `rows`, at least one and none empty, with its tensors on `device`; `step` is the `packing_step`."""
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    lengths = tuple(len(row) for row in tensors)
    if step is None:
        ids_BT = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        starts = tuple(range(0, ids_BT.numel(), ids_BT.shape[1]))
        return TokenBatch(ids_BT=ids_BT.to(device), starts_B=starts, lengths=lengths)
    num_tokens = sum(lengths)
    # With at least one, so that places can be rounded up as well.
    filling = round_up(num_tokens + 1, step) - num_tokens if step > 1 else 0
    # On an accelerator a kernel more costs more than padding, of which there should just not be too much for memory.
    max_padding = _CPU_BLOCK_PADDING if device.type == "cpu" else num_tokens // 4
    return TokenBatch(
        ids_BT=torch.cat([*tensors, torch.zeros(filling, dtype=torch.int64)])[None].to(device),
        starts_B=tuple(accumulate(lengths[:-1], initial=0)),
        lengths=lengths,
        pack=Pack.of([*lengths, filling] if filling else lengths, device, max_padding=max_padding),
        step=step,
    )


def states_at(model: PreTrainedModel, batch: TokenBatch, positions_P: Tensor) -> Tensor:
    """Final hidden states `[P, D]` at flat `positions_P` of the batch, different but for filling."""
    if batch.pack is None:
        return hidden_states_at(model, batch.ids_BT, positions_P)
    output = model.base_model(
        input_ids=batch.ids_BT,
        position_ids=batch.pack.positions_T[None],
        # Keeps the model from making a mask; nobody reads it.
        attention_mask=batch.ids_BT.new_zeros(1, 1, 1, 1),
        use_cache=False,
        pack=batch.pack,
        asked_P=positions_P,
    )
    return cast(Tensor, output.last_hidden_state)[0]


def let_pack(model: PreTrainedModel) -> bool:
    """Lets `model` compute packs, if it is known to be a plain decoder; True if it was. To be called before it is
    sharded.
    """
    if not _is_plain(model):
        _log.info("%s trains on padded rows: no forward pass for packed ones is known", type(model).__name__)
        return False
    for layer in cast(nn.ModuleList, model.base_model.layers):
        kind = type(layer)
        # The name says which modules are to stay in one piece when a model is sharded.
        layer.__class__ = type(kind.__name__, (_PackedLayer, kind), {})
    return True


def _is_plain(model: PreTrainedModel) -> bool:
    config = model.config
    layers = getattr(model.base_model, "layers", ())
    return (
        config.model_type in KINDS
        and getattr(config, "hidden_act", None) in ("silu", "swish")
        and all(set(dict(layer.named_children())) == _PARTS for layer in layers)
        and getattr(config, "sliding_window", None) is None
    )


class _PackedLayer(nn.Module):
    """What a decoder layer does with a pack. A mixin: the layer's own class comes after it."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(self, hidden_states: Tensor, *args: Any, pack: Pack | None = None, **kwargs: Any) -> Tensor:
        """States `[1, T, D]`; those asked for alone, `[1, P, D]`, in the last layer of a pack."""
        if pack is None:
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        attention = self.self_attn
        is_last = attention.layer_idx == attention.config.num_hidden_layers - 1
        asked_P = kwargs["asked_P"] if is_last else None
        cos, sin = kwargs["position_embeddings"]
        states_TD, turn = hidden_states[0], (cos[0], sin[0])
        fast = _is_fast(states_TD, attention, self.mlp)
        heads = Heads(num_queries=attention.config.num_attention_heads, num_keys=attention.config.num_key_value_heads)
        project_all = _projected_fast if fast and not hasattr(attention, "q_norm") else _projected
        qkv_THR = project_all(self, states_TD, turn, asked_P)
        attended_TE = attend(qkv_THR, pack, heads, attention.scaling)
        if asked_P is not None:
            states_TD, attended_TE = states_TD.index_select(0, asked_P), attended_TE.index_select(0, asked_P)
        states_TD = states_TD + attention.o_proj(attended_TE)
        norm = self.post_attention_layernorm
        if fast:
            weights = (layer.weight for layer in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj))
            states_TD = feed_forward(states_TD, norm.weight, norm.variance_epsilon, *weights)
        else:
            states_TD = states_TD + self.mlp(norm(states_TD))
        return states_TD[None]


def _is_fast(states_TD: Tensor, attention: Any, mlp: Any) -> bool:
    layers = (attention.q_proj, mlp.gate_proj)
    return (
        all(isinstance(layer, OneDnnLinear) for layer in layers)
        and mlp.gate_proj.bias is None
        and states_TD.dtype == torch.float32
        and states_TD.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def _projected_fast(layer: Any, states_TD: Tensor, turn: tuple[Tensor, Tensor], asked_P: Tensor | None) -> Tensor:
    attention, norm = layer.self_attn, layer.input_layernorm
    size = attention.head_dim
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj

    def side_by_side(states: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[nn.Linear], turned: int) -> Tensor:
        weights, biases = [each.weight for each in layers], [each.bias for each in layers]
        return project(states, norm.weight, norm.variance_epsilon, weights, biases, turn, turned)

    if asked_P is None:
        turned = query.out_features + key.out_features
        return side_by_side(states_TD, turn, (query, key, value), turned).view(len(states_TD), -1, size)
    asked_turn = turn[0].index_select(0, asked_P), turn[1].index_select(0, asked_P)
    queries_PE = side_by_side(states_TD.index_select(0, asked_P), asked_turn, (query,), query.out_features)
    keys_TE = side_by_side(states_TD, turn, (key, value), key.out_features)
    queries_TE = queries_PE.new_zeros(len(states_TD), query.out_features).index_copy(0, asked_P, queries_PE)
    return torch.cat([queries_TE, keys_TE], -1).view(len(states_TD), -1, size)


def _projected(layer: Any, states_TD: Tensor, turn: tuple[Tensor, Tensor], asked_P: Tensor | None) -> Tensor:
    """Through the modules of the model; queries of all tokens, asked for or not."""
    attention = layer.self_attn
    normal_TD = layer.input_layernorm(states_TD)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (each(normal_TD).unflatten(-1, (-1, attention.head_dim)) for each in projections)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    turned = torch.cat([query, key], 1)
    cos_T1R, sin_T1R = (each[:, None] for each in turn)
    first, second = turned.chunk(2, -1)
    turned = turned * cos_T1R + torch.cat([-second, first], -1) * sin_T1R
    return torch.cat([turned.to(value.dtype), value], 1)
