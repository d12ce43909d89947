"""The parts of a model that each rank of a sharded trainer holds, cut anew along the tiles of the digest.

A rank tells which run of each flattened tensor it holds; FSDP2 shards the first dimension, so its parts are such runs.
Where a border lies within a tile (`steersman.wire.weights.digest`), the elements before the tile's end go from the rank
that holds them to the one that holds the tile's first element: less than a tile for each tensor and rank, never a whole
model. After that every tile is held by one rank, which hashes, encodes and sends it alone.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from steersman.trainer.weights.slices import Slice
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.digest import TILE_ELEMENTS


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """What one rank holds of one tensor.

    Attributes:
        names: all names of the tensor; several if it is tied. The same on all ranks, as are `shape` and the dtype.
        shape: of the whole tensor.
        element_offset: where in the flattened tensor `elements` begin.
        elements: contiguous, of any shape and on any device; may be empty. Over all ranks each element once.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    element_offset: int
    elements: Tensor


Bounds = NDArray[np.int64]
"""[rank, tensor, 2]: where each rank's elements of each tensor begin and end; 0 and 0 where it has none."""


def shards_of(model: nn.Module) -> Iterator[Shard]:
    """This rank's shards of the model's parameters and persistent buffers, sharing their memory.

    Of DTensors: sharded on the first dimension over one dimension of their mesh, and the same along the others, of
    which the first row counts. What is no DTensor is whole on every rank, and that of rank 0 counts. ValueError, naming
    the tensor, for other placements.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        offset, elements = _local(names[key][0], tensor.detach())
        shape = tuple(tensor.shape)
        yield Shard(names=tuple(names[key]), shape=shape, element_offset=offset, elements=elements)


def _local(name: str, tensor: Tensor) -> tuple[int, Tensor]:
    if not isinstance(tensor, DTensor):
        return 0, tensor if dist.get_rank() == 0 else tensor.reshape(-1)[:0]
    mesh, local = tensor.device_mesh, tensor.to_local()
    sharded = [at for at, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    placements = [tensor.placements[at] for at in sharded]
    if len(placements) > 1 or any(type(one) is not ShardPlacement or one.dim != 0 for one in placements):
        raise ValueError(
            f"{name} is placed as {tensor.placements}, allowed: shards of dimension 0 on one mesh dimension"
        )
    here = mesh.get_coordinate()
    if here is None or any(row != 0 for at, row in enumerate(here) if at not in sharded):
        return 0, local.reshape(-1)[:0]
    if not sharded:
        return 0, local
    rows = -(-tensor.shape[0] // mesh.size(sharded[0]))  # as torch.chunk; the last ranks may have fewer, or none
    first_row = min(tensor.shape[0], rows * here[sharded[0]])
    return first_row * (tensor.numel() // max(1, tensor.shape[0])), local


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which rank holds what, cut along tiles.

    Attributes:
        tensors: names and shape of each.
        bounds: of each rank and tensor, in the order of `tensors`.
    """

    tensors: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    bounds: Bounds


def recut(shards: Iterable[Shard], version: WeightVersion, group: dist.ProcessGroup) -> tuple[Layout, dict[str, Slice]]:
    """Copies of what this rank holds after the cut, on the CPU, by all names. A collective of `group`, on CPU tensors.

    ValueError on all ranks if their tensors, dtypes or versions differ, or if an element is held by none or by two.
    """
    mine = sorted(shards, key=lambda shard: shard.names)
    _require_same(mine, version, group)
    held = _gather(np.array([_bounds(shard) for shard in mine], np.int64).reshape(-1, 2), group)
    for index, shard in enumerate(mine):
        _require_cover(shard, held[:, index])
    cut = _cut(held, np.array([_size(shard) for shard in mine], np.int64))
    layout = Layout(tensors=tuple((shard.names, shard.shape) for shard in mine), bounds=cut)
    rank = dist.get_rank(group)
    slices = [_own_part(shard, held[rank, at], cut[rank, at]) for at, shard in enumerate(mine)]
    _exchange(mine, slices, _moves(held, cut), held, cut, group)
    return layout, {name: one for shard, one in zip(mine, slices, strict=True) for name in shard.names}


@dataclass(frozen=True, kw_only=True)
class _Move:
    """Elements of a tensor that go from one rank to another."""

    tensor: int
    source: int
    target: int
    start: int
    end: int


def _size(shard: Shard) -> int:
    return int(np.prod(shard.shape, dtype=np.int64))


def _bounds(shard: Shard) -> tuple[int, int]:
    num = shard.elements.numel()
    return (shard.element_offset, shard.element_offset + num) if num else (0, 0)


def _require_same(mine: Sequence[Shard], version: WeightVersion, group: dist.ProcessGroup) -> None:
    told = [str(version), *([shard.names, shard.shape, str(shard.elements.dtype)] for shard in mine)]
    number = xxhash.xxh3_64_intdigest(json.dumps(told).encode()) >> 1
    found = _gather(np.array([number, len(mine)], np.int64), group)
    if (found != found[0]).any():
        differing = np.flatnonzero((found != found[0]).any(axis=1)).tolist()
        raise ValueError(
            f"ranks {differing} have other names, shapes, dtypes or another version than rank 0; here are "
            f"{len(mine)} tensors of version {version}"
        )


def _gather(values: NDArray[np.int64], group: dist.ProcessGroup) -> NDArray[np.int64]:
    """[rank, ...]"""
    own = torch.from_numpy(values)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return torch.stack(parts).numpy()


def _require_cover(shard: Shard, held: NDArray[np.int64]) -> None:
    parts = held[held[:, 0] < held[:, 1]]
    parts = parts[parts[:, 0].argsort()]
    ends = np.concatenate([[0], parts[:, 1]])
    starts = np.concatenate([parts[:, 0], [_size(shard)]])
    if (starts != ends).any():
        at = int(np.flatnonzero(starts != ends)[0])
        raise ValueError(
            f"{shard.names[0]} of {_size(shard)} elements: one rank's part ends at {ends[at]} and the next begins at "
            f"{starts[at]}, must be each element once"
        )


def _cut(held: Bounds, sizes: NDArray[np.int64]) -> Bounds:
    """Who holds a tile's first element gets all of it."""
    start = -(-held[..., 0] // TILE_ELEMENTS) * TILE_ELEMENTS
    end = np.minimum(-(-held[..., 1] // TILE_ELEMENTS) * TILE_ELEMENTS, sizes)
    has_any = start < held[..., 1]
    return np.stack([np.where(has_any, start, 0), np.where(has_any, end, 0)], axis=-1)


def _moves(held: Bounds, cut: Bounds) -> list[_Move]:
    """By tensor, then by element."""
    moves = []
    for tensor in range(held.shape[1]):
        for source in held[:, tensor, 0].argsort(kind="stable").tolist():
            start, end = held[source, tensor].tolist()
            own_start, own_end = cut[source, tensor].tolist()
            head_end = min(end, own_start) if own_start < own_end else end
            if start < head_end:
                inside = (cut[:, tensor, 0] <= start) & (start < cut[:, tensor, 1])
                target = int(np.flatnonzero(inside)[0])
                moves.append(_Move(tensor=tensor, source=source, target=target, start=start, end=head_end))
    return moves


def _own_part(shard: Shard, held: NDArray[np.int64], cut: NDArray[np.int64]) -> Slice:
    """Room for all that this rank is to hold, filled with what it holds already."""
    start, end = cut.tolist()
    elements = torch.empty(end - start, dtype=shard.elements.dtype)
    own = shard.elements.reshape(-1)[start - int(held[0]) :] if start < end else shard.elements.reshape(-1)[:0]
    elements[: own.numel()].copy_(own)
    return Slice(element_offset=start, elements=elements)


def _exchange(
    mine: Sequence[Shard],
    slices: Sequence[Slice],
    moves: Sequence[_Move],
    held: Bounds,
    cut: Bounds,
    group: dist.ProcessGroup,
) -> None:
    if not moves:
        return
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    going = sorted((move for move in moves if move.source == rank), key=lambda move: move.target)
    coming = sorted((move for move in moves if move.target == rank), key=lambda move: move.source)
    items = [shard.elements.element_size() for shard in mine]
    sizes_out, sizes_in = [0] * num_ranks, [0] * num_ranks
    pieces = [torch.empty(0, dtype=torch.uint8)]
    for move in going:
        first = int(held[rank, move.tensor, 0])
        piece = mine[move.tensor].elements.reshape(-1)[move.start - first : move.end - first]
        pieces.append(piece.to("cpu").contiguous().view(torch.uint8))
        sizes_out[move.target] += (move.end - move.start) * items[move.tensor]
    for move in coming:
        sizes_in[move.source] += (move.end - move.start) * items[move.tensor]
    received = torch.empty(sum(sizes_in), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(pieces), sizes_in, sizes_out, group=group)
    at = 0
    for move in coming:
        nbytes = (move.end - move.start) * items[move.tensor]
        first = int(cut[rank, move.tensor, 0])
        target = slices[move.tensor].elements[move.start - first : move.end - first]
        target.view(torch.uint8).copy_(received[at : at + nbytes])
        at += nbytes
