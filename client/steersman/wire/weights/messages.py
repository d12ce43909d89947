"""The messages of a chunk stream, `PushChunksRequest` on the wire, without a copy of the elements.

Protobuf's own classes copy a chunk's elements twice on the way out and twice on the way in; for a dense push that is
most of its time. So the one form that nearly all messages have, a chunk and nothing else, with its fields in ascending
order as every serialiser writes them, is written and read here. Everything else goes through protobuf: other fields,
other orders, fields that a later version adds, and what is malformed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from steersman.v1 import weights_pb2
from steersman.wire.errors import invalid_field

PUSH_CHUNKS: Final = f"/{weights_pb2.DESCRIPTOR.services_by_name['WeightService'].full_name}/PushChunks"
"""The path of the method."""

# Field number and wire type of each field, as https://protobuf.dev/programming-guides/encoding says.
_CHUNK: Final = 0x12
_TENSOR_INDEX, _ELEMENT_OFFSET, _NUM_ELEMENTS, _ENCODING, _DATA, _CHECKSUM = 0x08, 0x10, 0x18, 0x20, 0x2A, 0x31
_NARROW: Final = frozenset({_TENSOR_INDEX, _ENCODING})
_VARINTS: Final = frozenset({_TENSOR_INDEX, _ELEMENT_OFFSET, _NUM_ELEMENTS, _ENCODING})
_CHECKSUM_BYTES: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Elements of one tensor, as in `WeightChunk`. `encoding` is a number of `WeightEncoding`, if it is good."""

    tensor_index: int
    element_offset: int
    num_elements: int
    data: bytes | memoryview
    checksum: int
    encoding: int = weights_pb2.WEIGHT_ENCODING_DENSE


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkMessage:
    """One message of a chunk stream. `raw` is what came; the chunk's data is a part of it, not a copy."""

    raw: bytes
    push_id: str = ""
    relay: Sequence[weights_pb2.RelayHop] = ()
    chunk: Chunk | None = None

    @property
    def onward(self) -> bytes:
        """The message for a replica further on: the chunk alone, byte for byte where it came alone."""
        if self.chunk is None or not (self.push_id or self.relay):
            return self.raw
        return encode_chunk(self.chunk)


def encode_chunk(chunk: Chunk) -> bytes:
    """A message with this chunk alone, as protobuf's deterministic serialisation would write it."""
    head = bytearray()
    for tag, value in (
        (_TENSOR_INDEX, chunk.tensor_index),
        (_ELEMENT_OFFSET, chunk.element_offset),
        (_NUM_ELEMENTS, chunk.num_elements),
        (_ENCODING, chunk.encoding),
    ):
        if value:
            head.append(tag)
            _put_varint(head, value)
    if len(chunk.data):
        head.append(_DATA)
        _put_varint(head, len(chunk.data))
    tail = b""
    if chunk.checksum:
        tail = bytes((_CHECKSUM,)) + chunk.checksum.to_bytes(_CHECKSUM_BYTES, "little")
    start = bytearray((_CHUNK,))
    _put_varint(start, len(head) + len(chunk.data) + len(tail))
    return b"".join((start, head, chunk.data, tail))


def decode_message(raw: bytes) -> ChunkMessage:
    """The message in `raw`. Raises INVALID_FIELD if it is none."""
    try:
        chunk = _read_lone_chunk(raw)
    except IndexError:  # cut short: protobuf says so
        chunk = None
    if chunk is not None:
        return ChunkMessage(raw=raw, chunk=chunk)
    try:
        message = weights_pb2.PushChunksRequest.FromString(raw)
    except DecodeError:
        raise invalid_field("message", f"{len(raw)} bytes", "a PushChunksRequest") from None
    return ChunkMessage(
        raw=raw,
        push_id=message.push_id,
        relay=message.relay,
        chunk=_from_proto(message.chunk) if message.HasField("chunk") else None,
    )


def _read_lone_chunk(raw: bytes) -> Chunk | None:
    """The chunk of a message that is nothing but one in the common form; None if it is anything else."""
    if not raw or raw[0] != _CHUNK:
        return None
    length, at = _read_varint(raw, 1)
    if at + length != len(raw):
        return None
    found: dict[int, int] = {}
    data = memoryview(b"")
    last_tag = 0
    while at < len(raw):
        tag = raw[at]
        if tag <= last_tag:
            return None
        last_tag = tag
        at += 1
        if tag in _VARINTS:
            found[tag], at = _read_varint(raw, at)
            # What a field of that width makes of a larger number is protobuf's business.
            if found[tag] >= (1 << 31 if tag in _NARROW else 1 << 63):
                return None
        elif tag == _DATA:
            length, at = _read_varint(raw, at)
            data = memoryview(raw)[at : at + length]
            at += length
        elif tag == _CHECKSUM:
            found[tag] = int.from_bytes(raw[at : at + _CHECKSUM_BYTES], "little")
            at += _CHECKSUM_BYTES
        else:
            return None
    if at != len(raw):
        return None
    return Chunk(
        tensor_index=found.get(_TENSOR_INDEX, 0),
        element_offset=found.get(_ELEMENT_OFFSET, 0),
        num_elements=found.get(_NUM_ELEMENTS, 0),
        encoding=found.get(_ENCODING, 0),
        data=data,
        checksum=found.get(_CHECKSUM, 0),
    )


def _from_proto(chunk: weights_pb2.WeightChunk) -> Chunk:
    return Chunk(
        tensor_index=chunk.tensor_index,
        element_offset=chunk.element_offset,
        num_elements=chunk.num_elements,
        encoding=chunk.encoding,
        data=chunk.data,
        checksum=chunk.checksum,
    )


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where the next byte stands. IndexError if it does not end."""
    value, shift = 0, 0
    while raw[at] & 0x80:
        value |= (raw[at] & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise IndexError(at)
    return value | raw[at] << shift, at + 1
