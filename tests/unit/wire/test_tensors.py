"""Tensors survive the wire bit by bit, and malformed ones are named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steersman.v1 import types_pb2
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.tensors import (
    DTYPE_NAMES,
    dtype_from_name,
    dtype_name,
    from_ragged,
    from_tensor,
    item_bytes,
    to_ragged,
    to_tensor,
)

ARRAYS = hnp.arrays(
    st.sampled_from(["<f4", ">f4", "<f8", "<f2", "i1", "<i2", "<i4", ">i8", "u1", "?"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)


@given(ARRAYS)
def test_round_trip(array: np.ndarray) -> None:
    message = types_pb2.Tensor.FromString(to_tensor(array).SerializeToString())
    result = from_tensor(message, "x")
    assert result.shape == array.shape
    assert result.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=6))
def test_ragged_round_trip(rows: list[list[int]]) -> None:
    ragged = to_ragged(rows, np.int32)
    assert [row.tolist() for row in from_ragged(ragged, "rows", np.int32)] == rows


def test_bfloat16_travels_raw() -> None:
    raw = np.array([0x3F80, 0x8000], np.uint16)
    tensor = to_tensor(raw, types_pb2.DATA_TYPE_BFLOAT16)
    assert from_tensor(tensor, "x").tolist() == raw.tolist()
    with pytest.raises(SteersmanError, match="x.dtype"):
        from_tensor(tensor, "x", np.uint16)


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        (types_pb2.Tensor(shape=[1], data=b"0000"), "x.dtype"),
        (types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_INT32, shape=[2], data=b"0000"), "x.data"),
        (types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_INT32, shape=[-1], data=b"0000"), "x.shape"),
        (types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_INT32, shape=[1] * 100, data=b"0000"), "x.shape"),
        (types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_INT32, shape=[2**62] * 1000, data=b"0000"), "x.shape"),
        (types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_INT32, shape=[0, 2**62, 2**62]), "x.shape"),
        (types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[1], data=b"0000"), "x.dtype"),
    ],
)
def test_malformed_tensors_are_named(tensor: types_pb2.Tensor, field: str) -> None:
    with pytest.raises(SteersmanError) as caught:
        from_tensor(tensor, "x", np.int32)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize("offsets", [[], [1, 3], [0, 2], [0, 2, 1, 3], [0, 4, 3], [0, 2**31 - 1, -(2**31), -1, 3]])
def test_malformed_offsets_are_named(offsets: list[int]) -> None:
    values = to_tensor(np.arange(3, dtype=np.int32))
    ragged = types_pb2.RaggedTensor(values=values, offsets=to_tensor(np.array(offsets, np.int32)))
    with pytest.raises(SteersmanError, match="rows.offsets"):
        from_ragged(ragged, "rows", np.int32)


def test_every_data_type_has_a_name_and_a_size() -> None:
    specified = set(types_pb2.DataType.values()) - {types_pb2.DATA_TYPE_UNSPECIFIED}
    assert set(DTYPE_NAMES.values()) == specified
    for value in specified:
        assert dtype_from_name(f"torch.{dtype_name(value)}") == value
        assert item_bytes(value) in (1, 2, 4, 8)
    with pytest.raises(ValueError, match="cannot travel"):
        dtype_from_name("complex64")
