"""Lossless sparse deltas: the changed elements of one span of a tensor, against the base version's same span.

Payload, little-endian:

    u8 version (1) | u8 layout | u8 item_bytes | u8 num_classes | u32 num_elements
    STEPS       u16 threshold, num_classes - 1 times; then for each class: u32 num_changes, and unless that is 0
                u8 coding of positions | u8 coding of exceptions | sections positions, signs, exceptions, magnitudes,
                wide                                                     (1 and 2 byte elements)
    PLANES      u32 num_changes | u8 coding | sections positions, plane 0, plane 1, ...
                                                                         (4 and 8 byte elements)
    PLANES_ALL  plane 0, plane 1, ... over all elements, changed or not  (where more than half has changed)

Sections follow a table of their lengths, each zstd or stored (`sections`); positions are in `positions`, steps and
planes in `steps`, classes in `contexts`. Every bit pattern of the new span is reproduced exactly.

A delta is not idempotent: steps add to what is there. Apply it once, to a copy of the base.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steersman.wire.weights import contexts, positions, steps
from steersman.wire.weights.errors import bad_chunk
from steersman.wire.weights.sections import Reader, pack_sections

VERSION: Final = 1
MAX_SPAN_ELEMENTS: Final = 1 << 24
"""Elements that one delta may describe: bounds what a reader has to hold."""

_STEPS: Final = 1
_PLANES: Final = 2
_PLANES_ALL: Final = 3
_HEADER: Final = struct.Struct("<BBBBI")
_COUNT: Final = struct.Struct("<I")
_CODING: Final = struct.Struct("<B")
_THRESHOLD: Final = struct.Struct("<H")
_STEP_BLOCK: Final = 32 * 1024


class Profile(StrEnum):
    """What a delta is made for."""

    FAST = "fast"
    """Links of a cluster: encoding keeps up with the network."""
    COMPACT = "compact"
    """Wide-area links: a quarter fewer bytes for 2-byte elements, at a third of the speed. Others are as in FAST."""


def encode_delta(base: NDArray[Any], new: NDArray[Any], *, profile: Profile = Profile.FAST) -> bytes | None:
    """The delta that turns `base` into `new`; None where the dense elements would not be larger.

    Both are flat, contiguous, of one 1, 2, 4 or 8 byte dtype and of equal size, at most MAX_SPAN_ELEMENTS: ValueError
    otherwise. Needs about 3 bytes for each changed 2-byte element while it works (8 in COMPACT), 4 times the span for
    4 and 8 byte elements.
    """
    old_bits, new_bits = _flat_bits(base, "base"), _flat_bits(new, "new")
    if old_bits.dtype != new_bits.dtype or old_bits.size != new_bits.size:
        found = f"{new_bits.size} elements of {new_bits.itemsize} bytes"
        raise ValueError(f"new is {found}, allowed: {old_bits.size} of {old_bits.itemsize} as in base")
    if old_bits.size == 0:
        return None
    if old_bits.itemsize > 2:
        body = _encode_planes(old_bits, new_bits)
    elif profile is Profile.COMPACT and old_bits.itemsize == 2:
        body = _encode_classes(old_bits, new_bits)
    else:
        body = _encode_one_class(old_bits, new_bits)
    return body if len(body) < new_bits.nbytes else None


@dataclass(frozen=True, kw_only=True)
class PackedChanges:
    """The changes of one span of 1 or 2 byte elements, found and packed elsewhere: on the accelerator that holds the
    weights. Sections as in `positions` and `steps`, positions always as gaps.

    Attributes:
        num_elements: of the span, 1 to MAX_SPAN_ELEMENTS.
        item_bytes: 1 or 2.
        num_changes: how many changed.
        gaps: where.
        signs: a bit for each, 1 for a step downwards.
        num_exceptions: how many moved by more than one step.
        exception_gaps: which of the changes these are.
        magnitudes: their steps less 2, 255 for those in `wide`.
        wide: magnitudes of 257 and more, little-endian.
    """

    num_elements: int
    item_bytes: int
    num_changes: int
    gaps: bytes
    signs: bytes
    num_exceptions: int
    exception_gaps: bytes
    magnitudes: bytes
    wide: bytes


def encode_packed(changes: PackedChanges) -> bytes | None:
    """What `encode_delta` in FAST makes of the span."""
    num_changes = changes.num_changes
    body = _HEADER.pack(VERSION, _STEPS, changes.item_bytes, 1, changes.num_elements) + _COUNT.pack(num_changes)
    if num_changes:
        coding, where = positions.finish_gaps(changes.gaps, num_changes, changes.num_elements)
        of_exceptions, exceptions = positions.finish_gaps(changes.exception_gaps, changes.num_exceptions, num_changes)
        body += _CODING.pack(coding) + _CODING.pack(of_exceptions)
        body += pack_sections([where, changes.signs, exceptions, changes.magnitudes, changes.wide])
    return body if len(body) < changes.num_elements * changes.item_bytes else None


def apply_delta(data: bytes | bytearray | memoryview, span: NDArray[Any]) -> int:
    """Turns the base elements in `span` into the new ones, in place; returns the number of changed elements.

    Raises WEIGHT_CHUNK_INVALID naming what is wrong with a malformed or truncated payload, before the first element is
    written. ValueError for a span that is not flat, contiguous and writeable.

    A payload that is well formed but belongs to another base gives wrong elements without an error: only the digest of
    the complete weights tells. So `span` is part of a staging copy, never of weights in use, and the copy is thrown
    away after any error; applying a delta a second time is no way back.
    """
    bits = _flat_bits(span, "span")
    if not bits.flags.writeable:
        raise ValueError("span is read-only, allowed: a writeable array")
    reader = Reader(data)
    version, layout, item_bytes, num_classes, num_elements = reader.unpack(_HEADER, "header")
    if version != VERSION:
        raise bad_chunk("version", version, str(VERSION))
    if item_bytes != bits.itemsize:
        raise bad_chunk("item_bytes", item_bytes, f"{bits.itemsize}, as the tensor has")
    if num_elements != bits.size:
        raise bad_chunk("num_elements", num_elements, f"{bits.size}, as the span has")
    if layout == _STEPS and item_bytes <= 2:
        return _apply_steps(reader, bits, num_classes)
    if layout in (_PLANES, _PLANES_ALL) and item_bytes > 2 and num_classes == 1:
        return _apply_planes(reader, bits, covers_all=layout == _PLANES_ALL)
    raise bad_chunk("layout", f"{layout} with {num_classes} classes", f"a layout for elements of {item_bytes} bytes")


def _flat_bits(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.ndim != 1 or not array.flags.c_contiguous or array.itemsize not in (1, 2, 4, 8):
        found = f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"{name} is {found}, allowed: one dimension, contiguous, elements of 1, 2, 4 or 8 bytes")
    if array.size > MAX_SPAN_ELEMENTS:
        raise ValueError(f"{name} has {array.size} elements, allowed: at most {MAX_SPAN_ELEMENTS}")
    return steps.integers(array)


def _header(layout: int, like: NDArray[Any], num_classes: int = 1) -> bytes:
    return _HEADER.pack(VERSION, layout, like.itemsize, num_classes, like.size)


def _changes(old: NDArray[Any], new: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[Any]]]:
    """Block after block: where it starts, positions of changes within it, their steps. Reads each element once."""
    mask = positions.new_mask(old.itemsize)
    for start in range(0, old.size, mask.size):
        old_block, new_block = old[start : start + mask.size], new[start : start + mask.size]
        changed = positions.changed_in_block(old_block, new_block, mask)
        yield start, changed, steps.steps_between(old_block.take(changed), new_block.take(changed))


def _pack_class(where: positions.PositionWriter, num_members: int, class_steps: list[NDArray[Any]]) -> bytes:
    moves = np.concatenate(class_steps)
    head = _COUNT.pack(moves.size)
    if moves.size == 0:
        return head
    coding, section = where.finish(num_members)
    exceptions_coding, sections = steps.encode_steps(moves)
    codings = _CODING.pack(coding) + _CODING.pack(exceptions_coding)
    return head + codings + pack_sections([section, *sections])


def _collect(old: NDArray[Any], new: NDArray[Any]) -> tuple[positions.PositionWriter, list[NDArray[Any]]]:
    where, all_steps = positions.PositionWriter(), []
    for start, changed, block_steps in _changes(old, new):
        all_steps.append(block_steps)
        changed += start
        where.add(changed)
    return where, all_steps


def _encode_one_class(old: NDArray[Any], new: NDArray[Any]) -> bytes:
    where, all_steps = _collect(old, new)
    return _header(_STEPS, old) + _pack_class(where, old.size, all_steps)


def _encode_classes(old: NDArray[Any], new: NDArray[Any]) -> bytes:
    blocks = [(start, changed.astype(np.int32), moved) for start, changed, moved in _changes(old, new)]
    changed_old = np.concatenate([old[start:].take(changed) for start, changed, _ in blocks])
    moved = np.concatenate([block_steps for _, _, block_steps in blocks])
    thresholds = contexts.choose_thresholds(old, changed_old, (moved != 1) & (moved != -1))

    num_classes = len(thresholds) + 1
    writers = [positions.PositionWriter() for _ in range(num_classes)]
    class_steps: list[list[NDArray[Any]]] = [[moved[:0]] for _ in range(num_classes)]
    members = [0] * num_classes
    masks_of = contexts.ClassMasks(thresholds)
    block_size = positions.BLOCK_BYTES // old.itemsize
    for start, changed, block_steps in blocks:
        block = old[start : start + block_size]
        for index, mask in enumerate(masks_of.of(block)):
            own = np.flatnonzero(mask.take(changed))
            ranks, size = contexts.ranks_in_class(mask, changed.take(own), block.size)
            ranks += members[index]
            writers[index].add(ranks)
            members[index] += size
            class_steps[index].append(block_steps.take(own))
    parts = [_header(_STEPS, old, num_classes), *map(_THRESHOLD.pack, thresholds)]
    parts += [_pack_class(*parts_of_class) for parts_of_class in zip(writers, members, class_steps, strict=True)]
    return b"".join(parts)


def _encode_planes(old: NDArray[Any], new: NDArray[Any]) -> bytes:
    if 2 * int(np.count_nonzero(old != new)) > old.size:
        return _header(_PLANES_ALL, old) + pack_sections(steps.encode_planes(steps.steps_between(old, new)))
    where, all_steps = _collect(old, new)
    joined = np.concatenate(all_steps)
    coding, section = where.finish(old.size)
    return (
        _header(_PLANES, old)
        + _COUNT.pack(joined.size)
        + _CODING.pack(coding)
        + pack_sections([section, *steps.encode_planes(joined)])
    )


@dataclass(frozen=True, kw_only=True)
class _Class:
    """One class as read and checked, positions aside: those are ranks until its members are known."""

    coding: int
    section: NDArray[np.uint8]
    steps: steps.StepReader

    def positions(self) -> Iterator[NDArray[np.int64]]:
        return positions.iter_positions(self.coding, self.section)


def _read_count(reader: Reader, allowed: int) -> int:
    (num_changes,) = reader.unpack(_COUNT, "num_changes")
    if num_changes > allowed:
        raise bad_chunk("num_changes", num_changes, f"at most {allowed}, the rest of the span")
    return num_changes


def _bytes_of(section: bytes | memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(section, np.uint8)


def _read_class(reader: Reader, bits: NDArray[Any], num_changes: int) -> _Class | None:
    """One class; None if nothing in it has changed."""
    if num_changes == 0:
        return None
    (coding,) = reader.unpack(_CODING, "positions")
    (exceptions_coding,) = reader.unpack(_CODING, "exceptions")
    num_bytes = -(-num_changes // 8)
    _, longest = positions.section_bounds("exceptions", exceptions_coding, num_changes, num_changes)
    sections = reader.sections(
        {
            "positions": positions.section_bounds("positions", coding, num_changes, bits.size),
            "signs": (num_bytes, num_bytes),
            "exceptions": (0, longest),
            "magnitudes": (0, num_changes),
            "wide": (0, num_changes * bits.itemsize),
        }
    )
    arrays = {name: _bytes_of(section) for name, section in sections.items()}
    where = arrays.pop("positions")
    positions.check_positions("positions", coding, where, num_changes, bits.size)
    moves = steps.StepReader(num_changes=num_changes, item_bytes=bits.itemsize, coding=exceptions_coding, **arrays)
    return _Class(coding=coding, section=where, steps=moves)


def _apply_steps(reader: Reader, bits: NDArray[Any], num_classes: int) -> int:
    highest = contexts.MAX_CLASSES if bits.itemsize == 2 else 1
    if not 1 <= num_classes <= highest:
        raise bad_chunk("num_classes", num_classes, f"1 to {highest}")
    thresholds = [reader.unpack(_THRESHOLD, "thresholds")[0] for _ in range(num_classes - 1)]
    if any(low >= high for low, high in zip([0, *thresholds], [*thresholds, 0x8000], strict=True)):
        raise bad_chunk("thresholds", thresholds, "ascending, 1 to 32767")
    classes, unchanged = [], bits.size
    for _ in range(num_classes):
        num_changes = _read_count(reader, unchanged)
        unchanged -= num_changes
        classes.append(_read_class(reader, bits, num_changes))
    reader.end()
    if num_classes == 1:
        chosen = [(found.positions(), found.steps) for found in classes if found]
    else:
        chosen = _locate_classes(bits, thresholds, classes)
    for blocks, moves in chosen:
        for block in blocks:
            steps.apply_steps(bits, block, moves.take(block.size))
    return bits.size - unchanged


def _locate_classes(
    bits: NDArray[Any], thresholds: list[int], classes: list[_Class | None]
) -> list[tuple[Iterator[NDArray[np.int64]], steps.StepReader]]:
    """Positions of all classes, found before any element is written: a class is known by the old value."""
    none = np.empty(0, np.int64)
    ranks = [np.concatenate(list(found.positions())) if found else none for found in classes]
    located, members = contexts.positions_of_ranks(bits, thresholds, ranks)
    chosen = []
    for index, found in enumerate(classes):
        if located[index].size != ranks[index].size:
            allowed = f"below {members[index]}, the members of class {index}"
            raise bad_chunk("positions", f"ranks up to {int(ranks[index][-1])}", allowed)
        if found:
            chosen.append((_blocks(located[index]), found.steps))
    return chosen


def _blocks(where: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (where[at : at + _STEP_BLOCK] for at in range(0, where.size, _STEP_BLOCK))


def _apply_planes(reader: Reader, bits: NDArray[Any], *, covers_all: bool) -> int:
    bounds, coding, num_changes = {}, 0, bits.size
    if not covers_all:
        num_changes = _read_count(reader, bits.size)
        (coding,) = reader.unpack(_CODING, "positions")
        bounds["positions"] = positions.section_bounds("positions", coding, num_changes, bits.size)
    bounds |= {f"plane {plane}": (num_changes, num_changes) for plane in range(bits.itemsize)}
    sections = [_bytes_of(section) for section in reader.sections(bounds).values()]
    reader.end()
    if covers_all:
        moved = 0
        for at in range(0, bits.size, _STEP_BLOCK):
            block = slice(at, at + _STEP_BLOCK)
            moves = steps.decode_planes([plane[block] for plane in sections])
            moved += int(np.count_nonzero(moves))
            moves += steps.ordered(bits[block])
            bits[block] = steps.ordered(moves)
        return moved
    where, *planes = sections
    positions.check_positions("positions", coding, where, num_changes, bits.size)
    at = 0
    for found in positions.iter_positions(coding, where):
        steps.apply_steps(bits, found, steps.decode_planes([plane[at : at + found.size] for plane in planes]))
        at += found.size
    return num_changes
