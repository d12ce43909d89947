"""The weights of one version, as a publisher sees them.

The trainer goes on changing its parameters while a replica that was away still needs the version before: so an image
is a copy, made once an update. One image serves replicas of different layouts and types.

    >>> image = WeightImage.of(model, WeightVersion(run_id="demo.1", step=3))
    >>> image.digest(manifest)                       # 16 bytes, XXH3-128
    >>> for chunk in image.chunks(manifest, max_bytes=2**20): ...
"""

import threading
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Protocol

from torch import Tensor, nn

from steersman.client.types import TensorSpec
from steersman.trainer.weights.cargo import Cargo, Delta, EncodedDelta, FullCargo
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.slices import DensePart, Manifest, Slice, WeightSlices
from steersman.wire.identity import WeightVersion
from steersman.wire.weights import manifest as shared
from steersman.wire.weights.digest import WeightDigest

__all__ = ["DensePart", "Image", "Manifest", "WeightImage"]


class Image(Protocol):
    """All weights of one version, wherever they are held. Never changed."""

    @property
    def version(self) -> WeightVersion:
        """Which."""
        ...

    def check(self, manifest: Sequence[TensorSpec]) -> None:
        """ValueError, naming the tensor, unless the manifest asks for every weight once and for nothing else."""
        ...

    def digest(self, manifest: Sequence[TensorSpec]) -> bytes:
        """The digest of all weights as `manifest` lays them out (see WeightSnapshot.digest of the protocol).
        Remembered. To be called from a thread: it may take long.
        """
        ...

    def full(self, manifest: Manifest, *, max_bytes: int) -> Cargo:
        """All weights, in chunks of at most `max_bytes`."""
        ...

    def since(
        self,
        base: "Image",
        manifest: Manifest,
        *,
        base_digest: bytes,
        max_bytes: int,
        encoding: PushEncoding,
        threads: Executor,
    ) -> Delta:
        """What turns `base`, an image of the same making, into this one, encoded from now on in `threads`. To be called
        on an event loop.
        """
        ...


class WeightImage(WeightSlices):
    """An image that this process holds alone, by Hugging Face name. Safe to read from several threads."""

    def __init__(self, version: WeightVersion, tensors: Mapping[str, Tensor]) -> None:
        flat: dict[int, Slice] = {}
        for tensor in tensors.values():
            flat.setdefault(id(tensor), Slice(element_offset=0, elements=tensor.reshape(-1)))
        super().__init__(version, {name: flat[id(tensor)] for name, tensor in tensors.items()})
        self._tensors = dict(tensors)
        self._digests: dict[Manifest, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: nn.Module, version: WeightVersion, *, device: str | None = "cpu") -> "WeightImage":
        """A copy of the model's parameters and persistent buffers, on `device`; None leaves each where it is. A tied
        tensor is copied once and known by all its names.

        Of an image on a GPU the changes are found and packed there (`device`), also against one on the host.
        """
        copies: dict[int, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().to(device or tensor.device, copy=True).contiguous()
            tensors[name] = copies[id(tensor)]
        return cls(version, tensors)

    def check(self, manifest: Sequence[TensorSpec]) -> None:
        """As in `Image`."""
        check_manifest(manifest, {name: (id(one), tuple(one.shape)) for name, one in self._tensors.items()})

    def digest(self, manifest: Sequence[TensorSpec]) -> bytes:
        """As in `Image`. Converts one tensor at a time."""
        key = tuple(manifest)
        with self._lock:
            if key not in self._digests:
                joined = WeightDigest(wire_manifest(manifest))
                for index, digests in enumerate(self.tile_digests(manifest)):
                    joined.put(index, 0, digests)
                self._digests[key] = joined.finish()
            return self._digests[key]

    def full(self, manifest: Manifest, *, max_bytes: int) -> FullCargo:
        """As in `Image`."""
        return FullCargo(slices=self, manifest=manifest, max_bytes=max_bytes)

    def since(
        self,
        base: Image,
        manifest: Manifest,
        *,
        base_digest: bytes,
        max_bytes: int,
        encoding: PushEncoding,
        threads: Executor,
    ) -> EncodedDelta:
        """As in `Image`."""
        assert isinstance(base, WeightImage)
        return EncodedDelta(
            base,
            self,
            manifest,
            base_digest=base_digest,
            hash_all=lambda: self.digest(manifest),
            max_bytes=max_bytes,
            encoding=encoding,
            threads=threads,
        )


def check_manifest(manifest: Sequence[TensorSpec], held: Mapping[str, tuple[Hashable, tuple[int, ...]]]) -> None:
    """As `Image.check`. `held` gives the identity and the shape of each tensor by all its names."""
    for spec in manifest:
        if spec.name not in held:
            raise ValueError(f"the replica serves {spec.name!r}, which the trained model does not have")
        shape = held[spec.name][1]
        if shape != spec.shape:
            raise ValueError(f"{spec.name!r} has shape {spec.shape} at the replica and {shape} here")
    covered = {held[spec.name][0] for spec in manifest}
    for name, (identity, _) in held.items():
        if identity not in covered:
            raise ValueError(f"the trained model has {name!r}, which the replica does not serve")


def wire_manifest(manifest: Sequence[TensorSpec]) -> shared.Manifest:
    """The manifest that both ends hash by."""
    specs = (shared.TensorSpec(name=spec.name, shape=spec.shape, dtype=spec.dtype) for spec in manifest)
    return shared.Manifest(tuple(specs))
