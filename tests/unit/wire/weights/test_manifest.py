"""A manifest survives the wire, and names where two models differ."""

import pytest

from steersman.v1 import types_pb2, weights_pb2
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.weights.manifest import Manifest, TensorSpec

A = TensorSpec(name="a", shape=(4, 2), dtype="bfloat16")
B = TensorSpec(name="b", shape=(), dtype="float32")
MANIFEST = Manifest.of([B, A])


def test_order_sizes_and_indices() -> None:
    assert MANIFEST.tensors == (A, B)
    assert (A.num_elements, A.nbytes, B.num_elements, B.nbytes) == (8, 16, 1, 4)
    assert MANIFEST.total_bytes == 20
    assert MANIFEST.index_of == {"a": 0, "b": 1}


def test_round_trip() -> None:
    message = weights_pb2.WeightManifest.FromString(MANIFEST.to_proto().SerializeToString())
    assert Manifest.from_proto(message) == MANIFEST


def test_a_data_type_that_is_none() -> None:
    message = weights_pb2.WeightManifest(
        tensors=[weights_pb2.TensorSpec(name="a", dtype=types_pb2.DATA_TYPE_UNSPECIFIED)]
    )
    with pytest.raises(SteersmanError, match=r"manifest.a.dtype is 0, allowed: a specified DataType") as caught:
        Manifest.from_proto(message)
    assert caught.value.reason is Reason.WEIGHT_MANIFEST_MISMATCH


@pytest.mark.parametrize(
    ("offered", "message"),
    [
        ([A], r"manifest.b is missing, allowed: float32\[\]"),
        ([A, B, TensorSpec(name="c", shape=(1,), dtype="int8")], r"manifest.c is int8\[1\], allowed: no tensor"),
        (
            [TensorSpec(name="a", shape=(2, 4), dtype="bfloat16"), B],
            r"manifest.a is bfloat16\[2, 4\], allowed: bfloat16\[4, 2\]",
        ),
        ([B, A], "manifest.tensors are doubled or out of order"),
        ([A, A, B], "manifest.tensors are doubled or out of order"),
        ([TensorSpec(name="c", shape=(1,), dtype="int8")], r"manifest.a is missing, .* \(and 2 more\)"),
    ],
)
def test_differences_are_named(offered: list[TensorSpec], message: str) -> None:
    MANIFEST.require_same(MANIFEST.tensors)
    with pytest.raises(SteersmanError, match=message) as caught:
        MANIFEST.require_same(offered)
    assert caught.value.reason is Reason.WEIGHT_MANIFEST_MISMATCH
    assert caught.value.violations
