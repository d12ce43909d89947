"""The listener for probes: always reachable, and good for nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.handler import RewardHandler
from steersman.reward.servicer import RewardService
from steersman.reward.settings import FunctionScorerSettings
from steersman.serving.metrics import Metrics
from steersman.serving.security.tls import TlsSettings
from steersman.serving.server import PortInUse, RunningServer, start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import reward_pb2, reward_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REWARD = "steersman.v1.RewardService"
TIMEOUT = 10


class FailingService(RewardService):
    """A reward service whose engine fails when told to."""

    failing = False

    async def check_health(self) -> None:
        if self.failing:
            raise RuntimeError("the engine is away")


def service() -> FailingService:
    scorer = FunctionScorer("length", lambda items: [1.0 for _ in items], FunctionScorerSettings(function="m:f"))
    return FailingService(RewardHandler({"length": scorer}, "length"))


@asynccontextmanager
async def serving(settings: ServerSettings, served: FailingService | None = None) -> AsyncIterator[RunningServer]:
    server = await start_server(served or service(), settings, Metrics("reward"))
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def probing(server: RunningServer) -> AsyncIterator[grpc.aio.Channel]:
    assert server.health_address is not None
    async with grpc.aio.insecure_channel(server.health_address) as channel:
        yield channel


async def check(channel: grpc.aio.Channel, name: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT)).status


async def until(channel: grpc.aio.Channel, wanted: int) -> None:
    # Each answer is a round trip through the server's loop, so its own looks at the engine take place meanwhile.
    for _ in range(10_000):
        if await check(channel) == wanted:
            return
    raise AssertionError(f"never {wanted}")


async def refusal(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code()


def quick(**more: object) -> ServerSettings:
    return ServerSettings(health_port=0, health_interval_seconds=0.001, **more)


async def test_probes_follow_the_engine() -> None:
    served = service()
    async with serving(quick(), served) as server, probing(server) as channel:
        await until(channel, SERVING)
        assert await check(channel, REWARD) == SERVING
        served.failing = True
        await until(channel, NOT_SERVING)
        assert await refusal(check(channel, "nobody")) is grpc.StatusCode.NOT_FOUND


async def test_probes_need_no_certificate_where_callers_do(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = TlsSettings(
        certificate=tmp_path / "cert.pem", private_key=tmp_path / "key.pem", client_ca=tmp_path / "ca.pem"
    )
    async with serving(quick(tls=tls)) as server:
        async with probing(server) as channel:
            await until(channel, SERVING)
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert await refusal(check(channel)) is grpc.StatusCode.UNAVAILABLE


async def test_nothing_else_is_answered() -> None:
    async with serving(quick()) as server, probing(server) as channel:
        reward = reward_pb2_grpc.RewardServiceStub(channel)
        request = reward_pb2.ListScorersRequest()
        assert await refusal(reward.ListScorers(request, timeout=TIMEOUT)) is grpc.StatusCode.UNIMPLEMENTED
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await watch.read()
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_server_full_of_calls_still_answers_probes() -> None:
    async with (
        serving(quick(max_concurrent_rpcs=1)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
        probing(server) as probe,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        await watch.read()
        assert await refusal(check(channel)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(probe, SERVING)
        watch.cancel()


async def test_it_is_off_unless_asked_for() -> None:
    async with serving(ServerSettings()) as server:
        assert server.health_address is None


async def test_a_port_in_use_is_named() -> None:
    async with serving(quick()) as server:
        assert server.health_address is not None
        port = int(server.health_address.rpartition(":")[2])
        with pytest.raises(PortInUse, match=f"health_port: cannot listen on 127.0.0.1:{port}"):
            async with serving(ServerSettings(health_port=port)):
                pass
