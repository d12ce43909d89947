"""What the lead of a sharded trainer and its other ranks write to each other, as JSON values."""

from collections.abc import Sequence
from typing import Any

from steersman.client.types import PushReceipt, RelayHop, RelayReceipt, TensorSpec
from steersman.trainer.weights.slices import Manifest
from steersman.trainer.weights.stream import Sent
from steersman.v1 import types_pb2
from steersman.wire.status import status_from_proto, status_to_proto


def manifest_to_json(manifest: Sequence[TensorSpec]) -> Any:
    """Names, shapes and types."""
    return [[spec.name, spec.shape, spec.dtype] for spec in manifest]


def manifest_from_json(value: Any) -> Manifest:
    """What was written by `manifest_to_json`."""
    return tuple(TensorSpec(name=name, shape=tuple(shape), dtype=dtype) for name, shape, dtype in value)


def hops_to_json(hops: Sequence[RelayHop]) -> Any:
    """A route."""
    return [[hop.target, hop.push_id, hops_to_json(hop.next)] for hop in hops]


def hops_from_json(value: Any) -> tuple[RelayHop, ...]:
    """What was written by `hops_to_json`."""
    return tuple(
        RelayHop(target=target, push_id=push_id, next=hops_from_json(behind)) for target, push_id, behind in value
    )


def sent_to_json(sent: Sent) -> Any:
    """What a push sent."""
    receipt = sent.receipt
    relayed = [
        [one.target, status_to_proto(one.error).SerializeToString().hex(), one.received_bytes, one.num_chunks]
        for one in receipt.relayed
    ]
    return [sent.num_bytes, receipt.received_bytes, receipt.num_chunks, relayed]


def sent_from_json(value: Any) -> Sent:
    """What was written by `sent_to_json`."""
    num_bytes, received_bytes, num_chunks, relayed = value
    receipts = (
        RelayReceipt(
            target=target,
            error=status_from_proto(types_pb2.ItemStatus.FromString(bytes.fromhex(status))),
            received_bytes=received,
            num_chunks=chunks,
        )
        for target, status, received, chunks in relayed
    )
    receipt = PushReceipt(received_bytes=received_bytes, num_chunks=num_chunks, relayed=tuple(receipts))
    return Sent(receipt=receipt, num_bytes=num_bytes)
