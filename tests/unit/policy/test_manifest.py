"""Layout, digest and comparison of manifests."""

import dataclasses

import pytest
from policy_fakes import MANIFEST, host_bytes, random_weights, slow_digest

from steersman.policy.weights.manifest import HostManifest, TensorSpec, digest
from steersman.wire.errors import MAX_VIOLATIONS, Reason, SteersmanError


def test_slots_are_aligned_and_disjoint() -> None:
    assert [slot.name for slot in MANIFEST.slots] == ["a.weight", "b.weight", "c.scale"]
    assert [slot.offset_bytes for slot in MANIFEST.slots] == [0, 64, 128]
    assert [slot.nbytes for slot in MANIFEST.slots] == [10, 48, 4]
    assert MANIFEST.nbytes == 132
    assert MANIFEST.total_bytes == 62


def test_digest_is_what_the_contract_says() -> None:
    weights = random_weights(0)
    copy = memoryview(bytearray(host_bytes(weights)))
    assert digest(MANIFEST, copy) == slow_digest(weights)


def test_digest_does_not_see_the_gaps() -> None:
    copy = bytearray(host_bytes(random_weights(0)))
    before = digest(MANIFEST, memoryview(copy))
    copy[11] ^= 1
    assert digest(MANIFEST, memoryview(copy)) == before
    copy[9] ^= 1
    assert digest(MANIFEST, memoryview(copy)) != before


def test_the_same_tensors_pass() -> None:
    MANIFEST.require_same(list(MANIFEST.tensors))


def offer(**changes: object) -> list[TensorSpec]:
    first, *rest = MANIFEST.tensors
    return [dataclasses.replace(first, **changes), *rest]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offered", "field", "fact"),
    [
        (list(MANIFEST.tensors[1:]), "manifest.a.weight", "is missing"),
        (
            [*MANIFEST.tensors, TensorSpec(name="lm_head.weight", shape=(2,), dtype="float32")],
            "manifest.lm_head.weight",
            "allowed: no tensor of that name",
        ),
        (offer(shape=(5, 1)), "manifest.a.weight", "is bfloat16[5, 1], allowed: bfloat16[5]"),
        (offer(dtype="float32"), "manifest.a.weight", "is float32[5], allowed: bfloat16[5]"),
        (list(reversed(MANIFEST.tensors)), "manifest.tensors", "ascending order"),
        ([*MANIFEST.tensors, MANIFEST.tensors[-1]], "manifest.tensors", "doubled"),
    ],
)
def test_a_difference_is_named(offered: list[TensorSpec], field: str, fact: str) -> None:
    with pytest.raises(SteersmanError) as caught:
        MANIFEST.require_same(offered)
    assert caught.value.reason is Reason.WEIGHT_MANIFEST_MISMATCH
    assert caught.value.violations[0].field == field
    assert fact in caught.value.message


def test_only_the_first_differences_are_listed() -> None:
    large = HostManifest.of(TensorSpec(name=f"t{i:02}", shape=(1,), dtype="float32") for i in range(30))
    with pytest.raises(SteersmanError) as caught:
        large.require_same([])
    assert len(caught.value.violations) == MAX_VIOLATIONS
    assert "29 more" in caught.value.message
