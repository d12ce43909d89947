"""How far a sender can run ahead of a replica."""

import asyncio
from collections.abc import Iterator

import pytest
from policy_fakes import FakeEngine, FakeSource

from steersman.client import AsyncWeightClient
from steersman.client.types import WeightChunk
from steersman.policy.app import PolicyService
from steersman.policy.settings import PolicySettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import STREAM_WINDOW_BYTES, start_server
from steersman.wire.errors import Code, SteersmanError
from steersman.wire.limits import WEIGHT_CHUNK_BYTES

WINDOW_CHUNKS = STREAM_WINDOW_BYTES // WEIGHT_CHUNK_BYTES
# On the way: a message that is read, one that is written, and what the sockets hold.
SLACK_CHUNKS = 16
DEADLINE_S = 3.0


async def test_a_replica_that_stands_still_holds_a_bounded_part_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PolicySettings(model="unused", port=0, metrics_port=None)
    metrics = Metrics("policy")
    service = PolicyService(FakeEngine(), FakeSource(), settings, metrics)
    stands_still = asyncio.Event()
    monkeypatch.setattr(service.store, "write", lambda push_id, chunk: stands_still.wait())
    server = await start_server(service, settings, metrics)
    num_sent = 0

    def chunks() -> Iterator[WeightChunk]:
        nonlocal num_sent
        data = bytes(WEIGHT_CHUNK_BYTES)
        for _ in range(8 * WINDOW_CHUNKS):
            yield WeightChunk(tensor_index=0, element_offset=0, num_elements=1, data=data, checksum=1)
            num_sent += 1

    async with AsyncWeightClient(server.address) as client:
        with pytest.raises(SteersmanError) as caught:
            await client.push("push", chunks(), timeout=DEADLINE_S)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert WINDOW_CHUNKS // 2 < num_sent < WINDOW_CHUNKS + SLACK_CHUNKS
    stands_still.set()
    await server.stop()
