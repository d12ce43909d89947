"""Weights that one process holds: of each tensor all elements, or a run of them, as they travel.

Never changed once made, so safe to read from several threads. A replica says in its manifest which tensors it wants, in
which layout and element type; the same slices serve replicas of different types.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.client.types import TensorSpec, WeightChunk
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.digest import chunk_checksum, tile_digests

Manifest = tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class DensePart:
    """Elements of one tensor of a manifest that travel as they are. Made into a chunk when it is sent: until then the
    slices hold them already.
    """

    tensor_index: int
    element_offset: int
    num_elements: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """A run of a tensor's elements: `elements`, flat and on any device, from `element_offset` of the flattened tensor
    on. It begins where a tile of the digest begins and ends where one ends.
    """

    element_offset: int
    elements: Tensor


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING = Slice(element_offset=0, elements=torch.empty(0))


class WeightSlices:
    """Slices by Hugging Face name; a tied tensor by any of its names."""

    def __init__(self, version: WeightVersion, slices: Mapping[str, Slice]) -> None:
        self.version = version
        self._slices = dict(slices)

    def has_types(self, manifest: Sequence[TensorSpec]) -> bool:
        """Whether the weights are of the replica's element types, so that nothing is to be converted."""
        slices = ((self._slices.get(spec.name), spec) for spec in manifest)
        return all(held is None or held.elements.dtype is getattr(torch, spec.dtype) for held, spec in slices)

    def offset(self, spec: TensorSpec) -> int:
        """Where in the flattened tensor the elements held begin."""
        return self._slice(spec).element_offset

    def num_elements(self, spec: TensorSpec) -> int:
        """How many elements of a tensor are held."""
        return self._slice(spec).elements.numel()

    def elements(self, spec: TensorSpec) -> NDArray[Any]:
        """The elements held of one tensor in the replica's type, flat, as unsigned integers of its width. Not to be
        written to: no copy where the types agree.
        """
        return _bits(self._slice(spec).elements.to(getattr(torch, spec.dtype)))

    def integers(self, spec: TensorSpec, device: torch.device) -> Tensor:
        """The same as signed integers on `device`."""
        elements = self._slice(spec).elements.to(device).to(getattr(torch, spec.dtype))
        return elements.view(_INTEGERS[elements.element_size()])

    def device(self) -> torch.device:
        """Where the elements are; the CPU if there are none."""
        devices = {held.elements.device for held in self._slices.values()}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    def tile_digests(self, manifest: Sequence[TensorSpec]) -> Iterator[bytes]:
        """Of each tensor, the digests of the tiles held, as `manifest` has it. Converts one tensor at a time."""
        for spec in manifest:
            elements = self.elements(spec)
            yield tile_digests(elements, elements.itemsize)

    def chunks(self, manifest: Sequence[TensorSpec], *, max_bytes: int) -> Iterator[WeightChunk]:
        """The elements held as dense chunks of at most `max_bytes`, each converted only when it is asked for."""
        for index, spec in enumerate(manifest):
            for part in self.parts(index, spec, max_bytes=max_bytes):
                yield self.chunk(part, spec)

    def parts(self, index: int, spec: TensorSpec, *, max_bytes: int) -> Iterator[DensePart]:
        """What is held of one tensor, number `index` of the manifest, in parts of at most `max_bytes`."""
        first = self.offset(spec)
        behind = first + self.num_elements(spec)
        step = max(1, max_bytes // getattr(torch, spec.dtype).itemsize)
        for start in range(first, behind, step):
            yield DensePart(tensor_index=index, element_offset=start, num_elements=min(step, behind - start))

    def chunk(self, part: DensePart, spec: TensorSpec) -> WeightChunk:
        """The dense chunk of a part of the tensor `spec`. Its data is no copy where the types agree."""
        start = part.element_offset - self.offset(spec)
        elements = self._slice(spec).elements[start : start + part.num_elements]
        data = _bits(elements.to(getattr(torch, spec.dtype))).view("u1").data
        return WeightChunk(
            tensor_index=part.tensor_index,
            element_offset=part.element_offset,
            num_elements=part.num_elements,
            data=data,
            checksum=chunk_checksum(data),
        )

    def _slice(self, spec: TensorSpec) -> Slice:
        return self._slices.get(spec.name, _NOTHING)


def _bits(flat: Tensor) -> NDArray[Any]:
    # By way of bytes: numpy has no bfloat16 and no 8-bit floats.
    return flat.contiguous().cpu().view(torch.uint8).numpy().view(f"<u{flat.element_size()}")
