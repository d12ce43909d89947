"""Causal attention over a pack: rows of tokens one behind the other, without padding between them.

Everything but attention works token by token and never knows where a row ends. Attention lays rows of like length
into blocks, padded on the right: no real token sees what comes after it, so no mask but the causal one is needed, and
padding costs nothing but the few tokens that it is.

Shape suffixes: `T` tokens of a pack, `H` heads, `R` size of a head; `N` pairs of a row and a key-value head, `L` tokens
of the longest row of a block, `Q` its queries: `L` for each query head of a key-value head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Above it torch's kernel, which keeps no probabilities, is the better one; below it plain products are.
_LONGEST_FOR_PRODUCTS = 256


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Query heads, and the key-value heads that they share evenly. Queries, keys and values of a token lie one behind
    the other, as `num_queries + 2 * num_keys` heads.
    """

    num_queries: int
    num_keys: int

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.num_queries // self.num_keys

    @property
    def total(self) -> int:
        """Of queries, keys and values."""
        return self.num_queries + 2 * self.num_keys


@dataclass(frozen=True, kw_only=True)
class _Places:
    """How the heads of a block's tokens turn into rectangles, and back.

    `taken` are rows of `[tokens * heads, R]`, in the order of the rectangles of queries `[N, Q]`, keys `[N, L]` and
    values `[N, L]`; padding takes a token of its own row. `put` are the places of each head of each token in them.
    `taken_outputs`, `put_outputs` are the same for the outputs of queries; `padding` are places of queries to ignore.
    """

    taken: Tensor
    put: Tensor
    taken_outputs: Tensor
    put_outputs: Tensor
    padding: Tensor


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Rows of a pack, which lie in its tokens `tokens`. `tokens_bL` counts from the first of them."""

    tokens: slice
    tokens_bL: Tensor  # noqa: N815
    real_bL: Tensor  # noqa: N815

    def places(self, heads: Heads) -> _Places:
        """For any number of heads."""
        num_rows, width = self.tokens_bL.shape
        device = self.tokens_bL.device
        groups_KG = torch.arange(heads.num_queries, device=device).view(heads.num_keys, heads.group)
        keys_K = torch.arange(heads.num_keys, device=device)

        def taken(heads_KG: Tensor, num_heads: int) -> Tensor:
            """[key heads, rows, query heads of one, tokens], flat."""
            return (self.tokens_bL[None, :, None] * num_heads + heads_KG[:, None, :, None]).flatten()

        of_keys = [keys_K[:, None] + heads.num_queries + offset for offset in (0, heads.num_keys)]
        all_taken = torch.cat([taken(of_heads, heads.total) for of_heads in (groups_KG, *of_keys)])
        taken_outputs = taken(groups_KG, heads.num_queries)
        shape = (heads.num_keys, num_rows, heads.group, width)
        real_queries = self.real_bL[None, :, None].expand(shape).flatten()
        real_keys = self.real_bL[None].expand(heads.num_keys, -1, -1).flatten()
        return _Places(
            taken=all_taken,
            put=_inverse(all_taken, torch.cat([real_queries, real_keys, real_keys])),
            taken_outputs=taken_outputs,
            put_outputs=_inverse(taken_outputs, real_queries),
            padding=(~real_queries).nonzero().squeeze(1),
        )


def _inverse(taken: Tensor, real: Tensor) -> Tensor:
    places = real.nonzero().squeeze(1)
    return torch.empty_like(places).index_copy_(0, taken[places], places)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Rows of `lengths` tokens, each at least 1, one behind the other."""

    lengths: tuple[int, ...]
    positions_T: Tensor  # noqa: N815
    blocks: tuple[_Block, ...]
    _known: dict[Heads, list[_Places]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, *, max_padding: int) -> "Pack":
        """A pack whose neighbouring rows form blocks of at most `max_padding` tokens of padding. Little is padding if
        rows are sorted by length.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths are {list(lengths)}, must be at least one row of at least 1 token")
        blocks: list[_Block] = []
        start = first = 0
        while first < len(lengths):
            last = _end_of_block(lengths, first, max_padding)
            of_block = lengths[first:last]
            blocks.append(_block(of_block, start, device))
            start, first = start + sum(of_block), last
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(lengths=tuple(lengths), positions_T=positions.to(device), blocks=tuple(blocks))

    def places(self, heads: Heads) -> list[_Places]:
        """Of each block; made once."""
        if heads not in self._known:
            self._known[heads] = [block.places(heads) for block in self.blocks]
        return self._known[heads]


def _end_of_block(lengths: Sequence[int], first: int, max_padding: int) -> int:
    longest = total = 0
    for number, length in enumerate(lengths[first:]):
        longest, total = max(longest, length), total + length
        if longest * (number + 1) - total > max_padding:
            return first + number
    return len(lengths)


def _block(lengths: Sequence[int], start: int, device: torch.device) -> _Block:
    lengths_b1 = torch.tensor(lengths)[:, None]
    starts_b1 = lengths_b1.cumsum(0) - lengths_b1
    columns_L = torch.arange(max(lengths))
    return _Block(
        tokens=slice(start, start + sum(lengths)),
        tokens_bL=(starts_b1 + columns_L.minimum(lengths_b1 - 1)).to(device),
        real_bL=(columns_L < lengths_b1).to(device),
    )


def attend(qkv_THR: Tensor, pack: Pack, heads: Heads, scale: float) -> Tensor:
    """Each token's causal attention within its row: `[T, query heads * R]`. Differentiable.

    `qkv_THR` are the heads of :class:`Heads`, turned to their positions already.
    """
    short = max(pack.lengths) <= _LONGEST_FOR_PRODUCTS
    if short and qkv_THR.dtype == torch.float32 and qkv_THR.device.type == "cpu":
        output: Tensor = _Products.apply(qkv_THR, pack, heads, scale)  # type: ignore[no-untyped-call]
        return output
    outputs = [
        _attend_block(qkv_THR, *each, heads, scale) for each in zip(pack.blocks, pack.places(heads), strict=True)
    ]
    return torch.cat(outputs).view(len(qkv_THR), -1)


def _attend_block(qkv_THR: Tensor, block: _Block, places: _Places, heads: Heads, scale: float) -> Tensor:
    """`[tokens of the block * query heads, R]`, through torch's attention."""
    flat = qkv_THR[block.tokens].flatten(0, 1).index_select(0, places.taken)
    num_rows, width = block.tokens_bL.shape
    count = heads.num_keys * num_rows
    query, key, value = torch.split(flat, [count * heads.group * width, count * width, count * width])
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.view(count, heads.group, width, -1),
        key.view(count, 1, width, -1).expand(-1, heads.group, -1, -1),
        value.view(count, 1, width, -1).expand(-1, heads.group, -1, -1),
        is_causal=True,
        scale=scale,
    )
    return attended.flatten(0, 2).index_select(0, places.put_outputs)


class _Products(torch.autograd.Function):
    """Attention as batched products that keeps the probabilities: what it takes at a few dozen tokens a row is less
    than what torch's kernel does.
    """

    @staticmethod
    def forward(ctx: Any, qkv_THR: Tensor, pack: Pack, heads: Heads, scale: float) -> Tensor:
        output_TE = qkv_THR.new_empty(len(qkv_THR), heads.num_queries * qkv_THR.shape[-1])
        kept: list[Tensor] = []
        for block, places in zip(pack.blocks, pack.places(heads), strict=True):
            flat = qkv_THR[block.tokens].flatten(0, 1).index_select(0, places.taken)
            query_NQR, key_NLR, value_NLR = _rectangles(flat, block, heads)
            scores_NQL = torch.baddbmm(_causal(block, heads), query_NQR, key_NLR.mT, alpha=scale)
            chances_NQL = torch.softmax(scores_NQL, -1)
            attended = torch.bmm(chances_NQL, value_NLR).flatten(0, 1)
            into = output_TE[block.tokens].view(-1, qkv_THR.shape[-1])
            torch.index_select(attended, 0, places.put_outputs, out=into)
            kept += [flat, chances_NQL]
        ctx.save_for_backward(*kept)
        ctx.pack, ctx.heads, ctx.scale, ctx.shape = pack, heads, scale, qkv_THR.shape
        return output_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        heads, size = ctx.heads, ctx.shape[-1]
        grad_THR = grad_TE.new_empty(ctx.shape)
        kept = iter(ctx.saved_tensors)
        for block, places in zip(ctx.pack.blocks, ctx.pack.places(heads), strict=True):
            flat, chances_NQL = next(kept), next(kept)
            query_NQR, key_NLR, value_NLR = _rectangles(flat, block, heads)
            grad = grad_TE[block.tokens].reshape(-1, size).index_select(0, places.taken_outputs)
            # Outputs at padding go nowhere, so that keys and values of real tokens hear nothing of them.
            grad = grad.index_fill_(0, places.padding, 0.0).view_as(query_NQR)
            grads = torch.empty_like(flat)
            grad_query_NQR, grad_key_NLR, grad_value_NLR = _rectangles(grads, block, heads)
            torch.bmm(chances_NQL.mT, grad, out=grad_value_NLR)
            grad_chances_NQL = torch.bmm(grad, value_NLR.mT)
            grad_scores_NQL = torch.ops.aten._softmax_backward_data(grad_chances_NQL, chances_NQL, -1, flat.dtype)
            grad_scores_NQL *= ctx.scale
            torch.bmm(grad_scores_NQL, key_NLR, out=grad_query_NQR)
            torch.bmm(grad_scores_NQL.mT, query_NQR, out=grad_key_NLR)
            torch.index_select(grads, 0, places.put, out=grad_THR[block.tokens].view(-1, size))
        return grad_THR, None, None, None


def _rectangles(flat: Tensor, block: _Block, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[N, Q, R]`, keys and values `[N, L, R]`, as views."""
    num_rows, width = block.tokens_bL.shape
    count = heads.num_keys * num_rows
    query, key, value = torch.split(flat, [count * heads.group * width, count * width, count * width])
    size = flat.shape[-1]
    return query.view(count, -1, size), key.view(count, -1, size), value.view(count, -1, size)


def _causal(block: _Block, heads: Heads) -> Tensor:
    width = block.tokens_bL.shape[1]
    mask_LL = torch.full((width, width), float("-inf")).triu_(1)
    return mask_LL.repeat(heads.group, 1)
