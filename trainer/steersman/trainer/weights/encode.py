"""What travels of an image to a replica that holds the one before: changed elements where that is less, else all.

The codec is `steersman.wire.weights`; here stands when it is worth its time. A float32 replica of a float32 trainer
sees nearly every element change, and a slow encoder in front of a fast link is no gain either: so `auto` sends dense
what changed in too many places, and gives up for the rest of a push once the first large tensors all came out dense.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch

from steersman.client.types import WeightChunk, WeightEncoding
from steersman.trainer.weights.device import MAX_ITEM_BYTES, device_chunks
from steersman.trainer.weights.slices import DensePart, Manifest, WeightSlices
from steersman.wire.weights.chunks import DeltaOptions, EncodedChunk, Encoding, delta_chunks
from steersman.wire.weights.delta import Profile
from steersman.wire.weights.digest import chunk_checksum

MIN_DELTA_CHUNK_BYTES: Final = 1024
"""A replica that takes only smaller chunks gets dense ones."""
# Changed elements per element. A delta of bfloat16 at this density is still six times smaller than the elements, but
# made at half a gigabyte a second and thread: a 10 Gbit/s link is faster than that.
_MAX_DENSITY: Final = 0.25
# A tensor that tells something about the others: norms and biases do not.
_LARGE_ELEMENTS: Final = 1 << 14
# More than one: embeddings, which come first, may change otherwise than layers.
_NUM_TRIALS: Final = 3
_LOOKAHEAD_SPANS: Final = 2
_CPU: Final = torch.device("cpu")


class PushEncoding(StrEnum):
    """How weights travel to a replica that serves the version before. Others get all elements, always."""

    AUTO = "auto"
    """Changed elements where few have changed."""
    DENSE = "dense"
    """All elements. The version before is not kept."""
    DELTA = "delta"
    """Changed elements wherever that is smaller, however long it takes."""
    COMPACT = "compact"
    """As DELTA, in a quarter fewer bytes at a third of the speed: for wide-area links."""


@dataclass(kw_only=True)
class Tally:
    """Elements sent so far, and those of them that a sparse delta described."""

    elements: int = 0
    delta_elements: int = 0

    @property
    def delta_share(self) -> float:
        """In [0, 1]; 0 if nothing was sent."""
        return self.delta_elements / self.elements if self.elements else 0.0

    def add(self, other: "Tally") -> None:
        """Adds what another push sent."""
        self.elements += other.elements
        self.delta_elements += other.delta_elements

    def count(self, part: WeightChunk | DensePart) -> None:
        """Adds one chunk, sent or to be sent."""
        self.elements += part.num_elements
        if isinstance(part, WeightChunk) and part.encoding is WeightEncoding.SPARSE_DELTA:
            self.delta_elements += part.num_elements


def difference(
    base: WeightSlices,
    new: WeightSlices,
    manifest: Manifest,
    *,
    encoding: PushEncoding,
    max_bytes: int,
    threads: Executor,
    device: torch.device | None = None,
) -> Iterator[WeightChunk | DensePart]:
    """What turns `base` into `new`, slices of the same elements, at a replica with this manifest: every element once,
    in ascending order.

    `max_bytes`, the data of one chunk, is at least MIN_DELTA_CHUNK_BYTES. Changes are found on `device`, by default
    where `new` is, if that is no CPU; COMPACT is encoded on the host. There it is done ahead in `threads`; memory
    beyond the chunk in hand: one tensor of each image where the replica's type is another than the image's, and two
    spans. The chunks are the same, wherever they were made.
    """
    is_worth_it = encoding in (PushEncoding.DELTA, PushEncoding.COMPACT)
    options = DeltaOptions(
        profile=Profile.COMPACT if encoding is PushEncoding.COMPACT else Profile.FAST,
        max_chunk_bytes=max_bytes,
        max_density=1.0 if is_worth_it else _MAX_DENSITY,
    )
    if device is None and new.device() != _CPU:
        device = new.device()
    is_packed = device is not None and options.profile is Profile.FAST
    packed = device_chunks(base, new, manifest, device=device or _CPU, options=options, threads=threads)
    num_dense = 0
    for index, spec in enumerate(manifest):
        if num_dense >= _NUM_TRIALS and not is_worth_it:
            yield from new.parts(index, spec, max_bytes=max_bytes)
            continue
        if is_packed and getattr(torch, spec.dtype).itemsize <= MAX_ITEM_BYTES:
            chunks: Iterable[EncodedChunk] = next(packed)
        else:
            before, after = base.elements(spec), new.elements(spec)
            chunks = delta_chunks(before, after, options=options, executor=threads, lookahead=_LOOKAHEAD_SPANS)
        num_delta, num_elements = 0, new.num_elements(spec)
        for part in _parts(index, new.offset(spec), chunks):
            num_delta += part.num_elements if isinstance(part, WeightChunk) else 0
            yield part
        if num_elements >= _LARGE_ELEMENTS:
            if 2 * num_delta >= num_elements:
                is_worth_it = True
            else:
                num_dense += 1


def _parts(index: int, first: int, chunks: Iterable[EncodedChunk]) -> Iterator[WeightChunk | DensePart]:
    for chunk in chunks:
        offset = first + chunk.element_offset
        where = {"tensor_index": index, "element_offset": offset, "num_elements": chunk.num_elements}
        if chunk.encoding is Encoding.DENSE:
            yield DensePart(**where)
            continue
        checksum = chunk_checksum(chunk.data)
        yield WeightChunk(**where, data=chunk.data, checksum=checksum, encoding=WeightEncoding.SPARSE_DELTA)
