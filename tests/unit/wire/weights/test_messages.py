"""Chunk messages against protobuf's own reader and writer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.v1 import weights_pb2
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.weights.messages import PUSH_CHUNKS, Chunk, ChunkMessage, decode_message, encode_chunk

CHUNKS = st.builds(
    Chunk,
    tensor_index=st.integers(0, 2**32 - 1),
    element_offset=st.integers(0, 2**64 - 1),
    num_elements=st.integers(0, 2**64 - 1),
    encoding=st.integers(0, 2**31 - 1),
    data=st.binary(max_size=300),
    checksum=st.integers(0, 2**64 - 1),
)
FIELDS = ("tensor_index", "element_offset", "num_elements", "encoding", "data", "checksum")


def as_proto(chunk: Chunk) -> weights_pb2.WeightChunk:
    return weights_pb2.WeightChunk(**{name: getattr(chunk, name) for name in FIELDS})


def as_chunk(message: weights_pb2.WeightChunk) -> Chunk:
    return Chunk(**{name: getattr(message, name) for name in FIELDS})


def by_protobuf(raw: bytes) -> ChunkMessage:
    message = weights_pb2.PushChunksRequest.FromString(raw)
    chunk = as_chunk(message.chunk) if message.HasField("chunk") else None
    return ChunkMessage(raw=raw, push_id=message.push_id, relay=message.relay, chunk=chunk)


def same(one: ChunkMessage, other: ChunkMessage) -> bool:
    return (one.raw, one.push_id, list(one.relay), one.chunk) == (
        other.raw,
        other.push_id,
        list(other.relay),
        other.chunk,
    )


@given(CHUNKS)
def test_a_chunk_is_written_as_protobuf_writes_it(chunk: Chunk) -> None:
    expected = weights_pb2.PushChunksRequest(chunk=as_proto(chunk)).SerializeToString(deterministic=True)
    assert encode_chunk(chunk) == expected


@given(CHUNKS)
def test_what_is_written_is_read(chunk: Chunk) -> None:
    raw = encode_chunk(chunk)
    assert same(decode_message(raw), ChunkMessage(raw=raw, chunk=chunk))


@given(
    CHUNKS,
    st.text(max_size=8),
    st.lists(st.builds(weights_pb2.RelayHop, target=st.text(max_size=5), push_id=st.text(max_size=5)), max_size=3),
)
def test_other_fields_are_read(chunk: Chunk, push_id: str, relay: list[weights_pb2.RelayHop]) -> None:
    message = weights_pb2.PushChunksRequest(push_id=push_id, relay=relay, chunk=as_proto(chunk))
    found = decode_message(message.SerializeToString())
    assert (found.push_id, list(found.relay), found.chunk) == (push_id, relay, chunk)
    assert found.onward == encode_chunk(chunk)


# Tags, lengths, small numbers and noise: what a parser may stumble over, more often than random bytes would have it.
PIECES = st.one_of(
    st.sampled_from(
        [b"\x0a", b"\x12", b"\x1a", b"\x08", b"\x10", b"\x18", b"\x20", b"\x2a", b"\x31", b"\x32", b"\xff"]
    ),
    st.binary(min_size=1, max_size=9),
    CHUNKS.map(encode_chunk),
    CHUNKS.map(lambda chunk: as_proto(chunk).SerializeToString()),
)


@given(st.lists(PIECES, max_size=8).map(b"".join))
def test_any_bytes_mean_what_protobuf_says(raw: bytes) -> None:
    assert_as_protobuf(raw)


@given(CHUNKS, st.data())
def test_a_damaged_message_means_what_protobuf_says(chunk: Chunk, data: st.DataObject) -> None:
    raw = bytearray(encode_chunk(chunk))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert_as_protobuf(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


def assert_as_protobuf(raw: bytes) -> None:
    try:
        expected = by_protobuf(raw)
    except Exception:
        with pytest.raises(SteersmanError) as caught:
            decode_message(raw)
        assert caught.value.reason is Reason.INVALID_FIELD
    else:
        assert same(decode_message(raw), expected)


def test_the_elements_are_not_copied() -> None:
    raw = encode_chunk(Chunk(tensor_index=1, element_offset=0, num_elements=4, data=memoryview(b"abcd"), checksum=5))
    found = decode_message(raw)
    assert found.chunk is not None
    assert isinstance(found.chunk.data, memoryview)
    assert found.chunk.data.obj is raw
    assert found.onward is raw


def test_the_path_is_the_generated_one() -> None:
    assert PUSH_CHUNKS == "/steersman.v1.WeightService/PushChunks"
