"""What tensors a model has, where they lie in a host copy, and the digest of a copy.

A host copy holds the tensors in ascending order of name, each at a multiple of 64 bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import xxhash

from steersman.policy.engine.port import TensorSlot
from steersman.wire.errors import FieldViolation, Reason, SteersmanError
from steersman.wire.tensors import dtype_from_name, item_bytes

_ALIGNMENT: Final = 64
"""Bytes: a cache line, and a multiple of every element size."""
_MAX_VIOLATIONS: Final = 10
_HASH_BLOCK_BYTES: Final = 16 * 1024 * 1024


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
    """All tensors of a model, in ascending order of name."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> "Manifest":
        """The manifest of tensors in any order."""
        return cls(tuple(sorted(tensors, key=lambda tensor: tensor.name)))

    @cached_property
    def slots(self) -> tuple[TensorSlot, ...]:
        """Where each tensor lies in a host copy."""
        slots, offset = [], 0
        for tensor in self.tensors:
            slots.append(
                TensorSlot(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    offset_bytes=offset,
                    nbytes=tensor.nbytes,
                )
            )
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return tuple(slots)

    @property
    def nbytes(self) -> int:
        """Bytes of a host copy, gaps included; at least one."""
        last = self.slots[-1] if self.slots else None
        return max(1, last.offset_bytes + last.nbytes) if last else 1

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights, without gaps."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def require_same(self, offered: Sequence[TensorSpec]) -> None:
        """Checks that `offered` are these tensors, in this order.

        Raises WEIGHT_MANIFEST_MISMATCH naming up to ten tensors that are missing, unknown, doubled or
        different.
        """
        if tuple(offered) == self.tensors:
            return
        mine = {tensor.name: tensor for tensor in self.tensors}
        theirs = {tensor.name: tensor for tensor in offered}
        faults = [(name, f"is missing, allowed: {mine[name]}") for name in sorted(mine.keys() - theirs.keys())]
        faults += [
            (name, f"is {theirs[name]}, allowed: no tensor of that name")
            for name in sorted(theirs.keys() - mine.keys())
        ]
        faults += [
            (name, f"is {theirs[name]}, allowed: {mine[name]}")
            for name in sorted(mine.keys() & theirs.keys())
            if mine[name] != theirs[name]
        ]
        if not faults:
            faults = [("tensors", "are doubled or out of order, allowed: ascending order of name")]
        violations = [
            FieldViolation(field=f"manifest.{name}", description=text) for name, text in faults[:_MAX_VIOLATIONS]
        ]
        first = f"manifest.{faults[0][0]} {faults[0][1]}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise SteersmanError(Reason.WEIGHT_MANIFEST_MISMATCH, first + more, violations=violations)


def digest(manifest: Manifest, copy: memoryview) -> bytes:
    """XXH3-128 over all tensors of a host copy: for each its name, a zero byte, its elements. 16 bytes."""
    hasher = xxhash.xxh3_128()
    for slot in manifest.slots:
        hasher.update(slot.name.encode() + b"\0")
        end = slot.offset_bytes + slot.nbytes
        # In blocks: other threads get the interpreter between them.
        for start in range(slot.offset_bytes, end, _HASH_BLOCK_BYTES):
            hasher.update(copy[start : min(end, start + _HASH_BLOCK_BYTES)])
    return hasher.digest()
