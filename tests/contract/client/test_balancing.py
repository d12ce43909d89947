"""Calls are shared out over all addresses of a target, as a headless Service in Kubernetes needs it: a connection alone
would hold every call at one pod.
"""

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from steersman.client import AsyncReferenceClient, ReferenceClient
from steersman.v1 import reference_pb2, reference_pb2_grpc, types_pb2

ADD = reference_pb2_grpc.add_ReferenceServiceServicer_to_server


class Counting(reference_pb2_grpc.ReferenceServiceServicer):
    def __init__(self, name: str) -> None:
        self.name = name
        self.num_calls = 0

    async def GetModel(self, request: Any, context: Any) -> reference_pb2.ReferenceServiceGetModelResponse:
        self.num_calls += 1
        return reference_pb2.ReferenceServiceGetModelResponse(model=types_pb2.ModelInfo(name=self.name, dtype=1))


@pytest.fixture
async def pair(serve: Any) -> tuple[list[Counting], list[str]]:
    services = [Counting("a"), Counting("b")]
    return services, [await serve(ADD, service) for service in services]


async def both_seen(client: AsyncReferenceClient) -> None:
    """Calls until both have answered: until the second connection is there, the first gets every call."""
    seen: set[str] = set()
    async with asyncio.timeout(20):
        while len(seen) < 2:
            seen.add((await client.model()).name)


@pytest.mark.parametrize("form", ["ipv4:///{},{}", "ipv4:{},{}", "{},{}"])
async def test_calls_go_round_robin_over_the_addresses_of_a_target(pair: Any, form: str) -> None:
    services, addresses = pair
    async with AsyncReferenceClient(form.format(*addresses)) as client:
        await both_seen(client)
        before = [service.num_calls for service in services]
        answers = [(await client.model()).name for _ in range(10)]
    assert [service.num_calls - count for service, count in zip(services, before, strict=True)] == [5, 5]
    assert all(one != next_one for one, next_one in pairwise(answers))


async def test_the_blocking_client_does_so_too(pair: Any) -> None:
    _, addresses = pair

    def call() -> set[str]:
        with ReferenceClient("ipv4:///" + ",".join(addresses)) as client:
            seen: set[str] = set()
            for _ in range(1000):
                seen.add(client.model().name)
                if len(seen) == 2:
                    break
            return seen

    assert await asyncio.to_thread(call) == {"a", "b"}


async def test_an_address_that_is_away_costs_no_call_and_gets_its_share_when_it_is_back(serve: Any) -> None:
    alone, late = Counting("a"), Counting("b")
    first = await serve(ADD, alone)
    # A port that nobody listens at, for now.
    placeholder = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = placeholder.sockets[0].getsockname()[1]
    placeholder.close()
    await placeholder.wait_closed()
    async with AsyncReferenceClient(f"{first},127.0.0.1:{port}") as client:
        assert [(await client.model()).name for _ in range(10)] == ["a"] * 10
        assert await serve(ADD, late, port) == f"127.0.0.1:{port}"
        await both_seen(client)
