"""numpy arrays to and from `Tensor` and `RaggedTensor`.

A tensor travels as one block of little-endian bytes: packing costs a copy, reading costs nothing (the arrays that
`from_tensor` returns are read-only views of the message). numpy has no bfloat16 and no 8-bit floats; such tensors
are read as raw `uint16` and `uint8` arrays, and written by naming their data type.

    >>> ragged = to_ragged([np.array([5, 6, 7]), np.array([8])], np.int32)
    >>> [row.tolist() for row in from_ragged(ragged, "token_ids", np.int32)]
    [[5, 6, 7], [8]]
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from steersman.v1 import types_pb2
from steersman.wire.errors import invalid_field

_NUMPY_OF: Final[dict[int, np.dtype[Any]]] = {
    types_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
    types_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
    types_pb2.DATA_TYPE_INT8: np.dtype("i1"),
    types_pb2.DATA_TYPE_INT16: np.dtype("<i2"),
    types_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    types_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    types_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    types_pb2.DATA_TYPE_BOOL: np.dtype("?"),
    types_pb2.DATA_TYPE_FLOAT8_E4M3: np.dtype("u1"),
    types_pb2.DATA_TYPE_FLOAT8_E5M2: np.dtype("u1"),
}
_RAW: Final = {
    types_pb2.DATA_TYPE_BFLOAT16,
    types_pb2.DATA_TYPE_FLOAT8_E4M3,
    types_pb2.DATA_TYPE_FLOAT8_E5M2,
}
MAX_DIMENSIONS: Final = 16
# A message holds less than 2 GiB.
_MAX_ELEMENTS: Final = 2**31

_PROTO_OF: Final = {dtype: value for value, dtype in _NUMPY_OF.items() if value not in _RAW}

# Names as torch and safetensors write them, for code that moves tensors numpy cannot represent.
DTYPE_NAMES: Final[dict[str, types_pb2.DataType]] = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "float64": types_pb2.DATA_TYPE_FLOAT64,
    "float16": types_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": types_pb2.DATA_TYPE_BFLOAT16,
    "int8": types_pb2.DATA_TYPE_INT8,
    "int16": types_pb2.DATA_TYPE_INT16,
    "int32": types_pb2.DATA_TYPE_INT32,
    "int64": types_pb2.DATA_TYPE_INT64,
    "uint8": types_pb2.DATA_TYPE_UINT8,
    "bool": types_pb2.DATA_TYPE_BOOL,
    "float8_e4m3fn": types_pb2.DATA_TYPE_FLOAT8_E4M3,
    "float8_e5m2": types_pb2.DATA_TYPE_FLOAT8_E5M2,
}
_NAME_OF: Final[dict[int, str]] = {value: name for name, value in DTYPE_NAMES.items()}


def dtype_name(dtype: int) -> str:
    """Name of a data type as torch writes it, for example "bfloat16"."""
    return _NAME_OF.get(dtype, f"unknown data type {dtype}")


def dtype_from_name(name: str) -> types_pb2.DataType:
    """Data type of a torch name ("bfloat16" or "torch.bfloat16"). ValueError if the wire has none such."""
    try:
        return DTYPE_NAMES[name.removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"dtype {name!r} cannot travel; allowed: {', '.join(DTYPE_NAMES)}") from None


def item_bytes(dtype: int) -> int:
    """Bytes of one element. ValueError for an unspecified or unknown data type."""
    if dtype not in _NUMPY_OF:
        raise ValueError(f"dtype {dtype} is not a data type")
    return _NUMPY_OF[dtype].itemsize


def to_tensor(array: NDArray[Any], dtype: int | None = None) -> types_pb2.Tensor:
    """Packs an array of any shape. `dtype` names the type of raw arrays (bfloat16 held as uint16)."""
    if dtype is None:
        little_endian = array.dtype.newbyteorder("<")
        if little_endian not in _PROTO_OF:
            raise ValueError(f"array dtype is {array.dtype}, allowed: {', '.join(map(str, _PROTO_OF))}")
        dtype = _PROTO_OF[little_endian]
    data = np.ascontiguousarray(array, dtype=_NUMPY_OF[dtype]).tobytes()
    return types_pb2.Tensor(dtype=cast(types_pb2.DataType, dtype), shape=array.shape, data=data)


def from_tensor(tensor: types_pb2.Tensor, field: str, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """A read-only view of a tensor. Raises INVALID_FIELD naming `field` if it is malformed or not of `dtype`."""
    if tensor.dtype not in _NUMPY_OF:
        raise invalid_field(f"{field}.dtype", tensor.dtype, "a specified DataType")
    found = _NUMPY_OF[tensor.dtype]
    if dtype is not None and (found != np.dtype(dtype) or tensor.dtype in _RAW):
        raise invalid_field(f"{field}.dtype", dtype_name(tensor.dtype), str(np.dtype(dtype)))
    shape = tuple(tensor.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise invalid_field(f"{field}.shape", f"{len(shape)} dimensions", f"at most {MAX_DIMENSIONS} dimensions")
    # Even an empty tensor: numpy cannot make an array whose sizes other than 0 multiply to more than it can address.
    if any(size < 0 for size in shape) or math.prod(size for size in shape if size) > _MAX_ELEMENTS:
        raise invalid_field(f"{field}.shape", list(shape), f"sizes of at least 0, at most {_MAX_ELEMENTS} elements")
    expected = math.prod(shape) * found.itemsize
    if len(tensor.data) != expected:
        raise invalid_field(f"{field}.data", f"{len(tensor.data)} bytes", f"{expected} bytes for shape {list(shape)}")
    return np.frombuffer(tensor.data, dtype=found).reshape(shape)


def to_ragged(rows: Sequence[Any], dtype: DTypeLike) -> types_pb2.RaggedTensor:
    """Packs rows (arrays or lists) of different length."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
    return types_pb2.RaggedTensor(values=to_tensor(values), offsets=to_tensor(offsets))


def from_ragged(ragged: types_pb2.RaggedTensor, field: str, dtype: DTypeLike) -> list[NDArray[Any]]:
    """Rows as read-only views. Raises INVALID_FIELD naming the part of `field` that is malformed."""
    values = from_tensor(ragged.values, f"{field}.values", dtype)
    if values.ndim != 1:
        raise invalid_field(f"{field}.values.shape", list(values.shape), "one dimension")
    offsets = from_tensor(ragged.offsets, f"{field}.offsets", np.int32)
    if offsets.ndim != 1 or offsets.size == 0:
        raise invalid_field(f"{field}.offsets.shape", list(offsets.shape), "[num_rows + 1]")
    if offsets[0] != 0 or offsets[-1] != values.size or bool(np.any(offsets[1:] < offsets[:-1])):
        allowed = f"ascending from 0 to {values.size}, the number of values"
        raise invalid_field(f"{field}.offsets", offsets.tolist(), allowed)
    bounds = offsets.tolist()
    return [values[start:end] for start, end in pairwise(bounds)]
