"""The weights of one version, as they travel.

The trainer goes on changing its parameters while a replica that was away still needs the version before: so
an image is a copy, made once an update. A replica says in its manifest which tensors it wants, in which
layout and element type; one image serves replicas of different types.

    >>> image = WeightImage.of(model, WeightVersion(run_id="demo.1", step=3))
    >>> image.digest(manifest)                       # 16 bytes, XXH3-128
    >>> for chunk in image.chunks(manifest, max_bytes=2**20): ...
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steersman.client.types import TensorSpec, WeightChunk
from steersman.wire.identity import WeightVersion
from steersman.wire.weights import manifest as shared
from steersman.wire.weights.digest import WeightDigest, chunk_checksum

Manifest = tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class DensePart:
    """Elements of one tensor of a manifest that travel as they are. Made into a chunk when it is sent: until then the
    image holds them already.
    """

    tensor_index: int
    element_offset: int
    num_elements: int


class WeightImage:
    """Weights by Hugging Face name, on the CPU, never changed. Safe to read from several threads."""

    def __init__(self, version: WeightVersion, tensors: Mapping[str, Tensor]) -> None:
        self.version = version
        self._tensors = dict(tensors)
        self._digests: dict[Manifest, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: nn.Module, version: WeightVersion) -> "WeightImage":
        """A copy of the model's parameters and persistent buffers. A tied tensor is copied once and known by
        all its names.
        """
        copies: dict[int, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True).contiguous()
            tensors[name] = copies[id(tensor)]
        return cls(version, tensors)

    def check(self, manifest: Sequence[TensorSpec]) -> None:
        """ValueError, naming the tensor, unless the manifest asks for every weight once and for nothing else."""
        asked = {spec.name: spec for spec in manifest}
        for spec in manifest:
            tensor = self._tensors.get(spec.name)
            if tensor is None:
                raise ValueError(f"the replica serves {spec.name!r}, which the trained model does not have")
            if tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{spec.name!r} has shape {spec.shape} at the replica and {tuple(tensor.shape)} here")
        covered = {id(self._tensors[name]) for name in asked}
        for name, tensor in self._tensors.items():
            if id(tensor) not in covered:
                raise ValueError(f"the trained model has {name!r}, which the replica does not serve")

    def digest(self, manifest: Sequence[TensorSpec]) -> bytes:
        """The digest of all weights as `manifest` lays them out (see WeightSnapshot.digest of the protocol).
        Remembered. Converts one tensor at a time.
        """
        key = tuple(manifest)
        with self._lock:
            if key not in self._digests:
                digest = WeightDigest(_shared(manifest))
                for spec in manifest:
                    digest.add(spec.name, self.elements(spec))
                self._digests[key] = digest.finish()
            return self._digests[key]

    def has_types(self, manifest: Sequence[TensorSpec]) -> bool:
        """Whether the weights are of the replica's element types, so that nothing is to be converted."""
        return all(self._tensors[spec.name].dtype is getattr(torch, spec.dtype) for spec in manifest)

    def elements(self, spec: TensorSpec) -> NDArray[Any]:
        """All elements of one tensor in the replica's type, flat, as unsigned integers of its width. Not to be
        written to: no copy where the types agree.
        """
        return _bits(self._tensors[spec.name].reshape(-1).to(getattr(torch, spec.dtype)))

    def chunks(self, manifest: Sequence[TensorSpec], *, max_bytes: int) -> Iterator[WeightChunk]:
        """The weights as dense chunks of at most `max_bytes`, each converted only when it is asked for."""
        for index, spec in enumerate(manifest):
            for part in self.parts(index, spec, max_bytes=max_bytes):
                yield self.chunk(part, spec)

    def parts(self, index: int, spec: TensorSpec, *, max_bytes: int) -> Iterator[DensePart]:
        """All of one tensor, number `index` of the manifest, in parts of at most `max_bytes`."""
        size = self._tensors[spec.name].numel()
        step = max(1, max_bytes // getattr(torch, spec.dtype).itemsize)
        for start in range(0, size, step):
            yield DensePart(tensor_index=index, element_offset=start, num_elements=min(step, size - start))

    def chunk(self, part: DensePart, spec: TensorSpec) -> WeightChunk:
        """The dense chunk of a part of the tensor `spec`. Its data is no copy where the types agree."""
        start = part.element_offset
        elements = self._tensors[spec.name].reshape(-1)[start : start + part.num_elements]
        data = _bits(elements.to(getattr(torch, spec.dtype))).view("u1").data
        return WeightChunk(
            tensor_index=part.tensor_index,
            element_offset=start,
            num_elements=part.num_elements,
            data=data,
            checksum=chunk_checksum(data),
        )


def _shared(manifest: Sequence[TensorSpec]) -> shared.Manifest:
    specs = (shared.TensorSpec(name=spec.name, shape=spec.shape, dtype=spec.dtype) for spec in manifest)
    return shared.Manifest(tuple(specs))


def _bits(flat: Tensor) -> NDArray[Any]:
    # By way of bytes: numpy has no bfloat16 and no 8-bit floats.
    return flat.contiguous().view(torch.uint8).numpy().view(f"<u{flat.element_size()}")
