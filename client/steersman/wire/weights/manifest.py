"""Which tensors a model has: names, shapes and data types, in the order in which they are numbered and hashed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from steersman.v1 import weights_pb2
from steersman.wire.errors import MAX_VIOLATIONS, FieldViolation, Reason, SteersmanError
from steersman.wire.tensors import dtype_from_name, dtype_name, item_bytes


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor in Hugging Face name and layout. `dtype` is a torch name, for example "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """Product of the sizes; 1 for a scalar."""
        return math.prod(self.shape)

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return item_bytes(dtype_from_name(self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.num_elements * self.item_bytes

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Manifest:
    """All tensors of a model, in ascending order of name (of its code points), each name once."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> Self:
        """The manifest of tensors in any order."""
        return cls(tuple(sorted(tensors, key=lambda tensor: tensor.name)))

    @classmethod
    def from_proto(cls, manifest: weights_pb2.WeightManifest) -> Self:
        """The manifest as it came, in its order. WEIGHT_MANIFEST_MISMATCH for a data type that is none."""
        tensors = []
        for spec in manifest.tensors:
            try:
                item_bytes(spec.dtype)
            except ValueError:
                fault = f"is {spec.dtype}, allowed: a specified DataType"
                raise _mismatch([(f"{spec.name}.dtype", fault)]) from None
            tensors.append(TensorSpec(name=spec.name, shape=tuple(spec.shape), dtype=dtype_name(spec.dtype)))
        return cls(tuple(tensors))

    def to_proto(self) -> weights_pb2.WeightManifest:
        """The manifest as it travels."""
        return weights_pb2.WeightManifest(
            tensors=[
                weights_pb2.TensorSpec(name=spec.name, shape=spec.shape, dtype=dtype_from_name(spec.dtype))
                for spec in self.tensors
            ]
        )

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of the dense weights."""
        return sum(spec.nbytes for spec in self.tensors)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Index of each tensor by name."""
        return {spec.name: index for index, spec in enumerate(self.tensors)}

    def require_same(self, offered: Sequence[TensorSpec]) -> None:
        """Checks that `offered` are these tensors, in this order.

        Raises WEIGHT_MANIFEST_MISMATCH naming the first tensors that are missing, unknown, doubled or different.
        """
        if tuple(offered) == self.tensors:
            return
        mine = {spec.name: spec for spec in self.tensors}
        theirs = {spec.name: spec for spec in offered}
        faults = [(name, f"is missing, allowed: {mine[name]}") for name in sorted(mine.keys() - theirs.keys())]
        for name in sorted(theirs):
            if name not in mine:
                faults.append((name, f"is {theirs[name]}, allowed: no tensor of that name"))
            elif mine[name] != theirs[name]:
                faults.append((name, f"is {theirs[name]}, allowed: {mine[name]}"))
        raise _mismatch(faults or [("tensors", "are doubled or out of order, allowed: ascending order of name")])


def _mismatch(faults: list[tuple[str, str]]) -> SteersmanError:
    violations = [FieldViolation(field=f"manifest.{name}", description=text) for name, text in faults[:MAX_VIOLATIONS]]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    message = f"manifest.{faults[0][0]} {faults[0][1]}{more}"
    return SteersmanError(Reason.WEIGHT_MANIFEST_MISMATCH, message, violations=violations)
