"""Replicas that know their callers pass chunks on with credentials of their own."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
import yaml
from relay_fleet import (
    FakeEngine,
    Node,
    Servicer,
    Zeros,
    _Plane,
    digest_of,
    header,
    messages,
    weights,
)

from steersman.policy.engine.port import KvCachePolicy
from steersman.policy.metrics import PolicyMetrics
from steersman.policy.weights.relay import Relay, RelayRules, channel_opener
from steersman.policy.weights.store import WeightStore
from steersman.serving.metrics import Metrics
from steersman.serving.security.peer import PeerCredentials
from steersman.serving.security.tls import TlsSettings
from steersman.serving.server import start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import weights_pb2_grpc

CALLERS = {"trainer": ["push_weights"], "replica": ["push_weights"], "stranger": ["generate"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    (folder / "key.pem").write_bytes(issued.private_key_pem.bytes())
    (folder / "cert.pem").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    entries = []
    for name, roles in CALLERS.items():
        (folder / name).write_text(name + "\n")
        entries.append({"name": name, "token_sha256": hashlib.sha256(name.encode()).hexdigest(), "roles": roles})
    (folder / "callers.yaml").write_text(yaml.safe_dump({"callers": entries}))
    return folder


@asynccontextmanager
async def pair(folder: Path, shown: PeerCredentials | None) -> AsyncIterator[list[Node]]:
    """Two replicas with open pushes, which show `shown` to each other."""
    tls = TlsSettings(certificate=folder / "cert.pem", private_key=folder / "key.pem")
    settings = ServerSettings(tls=tls, access_file=folder / "callers.yaml")
    trainer = PeerCredentials(ca=folder / "ca.pem", token=folder / "trainer").to_grpc()
    nodes, channels = [], []
    try:
        for _ in range(2):
            engine, metrics = FakeEngine(), Metrics("policy")
            store = WeightStore(engine, Zeros(), KvCachePolicy.KEEP)
            relay = Relay(RelayRules(stall_seconds=5.0), channel_opener(shown))
            servicer = Servicer(store, PolicyMetrics(metrics), relay)
            server = await start_server(_Plane(store, engine, servicer), settings, metrics)
            channels.append(grpc.aio.secure_channel(server.address, trainer))
            stub = weights_pb2_grpc.WeightServiceStub(channels[-1])
            nodes.append(Node(server=server, store=store, engine=engine, servicer=servicer, metrics=metrics, stub=stub))
            await nodes[-1].begin()
        yield nodes
    finally:
        for channel in channels:
            await channel.close()
        for node in nodes:
            await node.stop()


async def push(nodes: list[Node]) -> list[int]:
    """Sends everything to the first, to be passed on to the second; the codes of the links."""
    first, second = nodes
    stream = iter([header(first, second.hop()), *messages(weights())])
    response = await first.stub.PushChunks(stream, timeout=20)
    return [relayed.status.code for relayed in response.relayed]


async def test_chunks_are_passed_on_over_tls(folder):
    shown = PeerCredentials(ca=folder / "ca.pem", token=folder / "replica")
    async with pair(folder, shown) as nodes:
        assert await push(nodes) == [0]
        for node in nodes:
            await node.finish(digest_of(weights()))


@pytest.mark.parametrize(
    ("shown", "code"),
    [
        ({"ca": "ca.pem", "token": "stranger"}, grpc.StatusCode.PERMISSION_DENIED),
        ({"ca": "ca.pem"}, grpc.StatusCode.UNAUTHENTICATED),
        ({"ca": "gone.pem", "token": "replica"}, grpc.StatusCode.INTERNAL),
        (None, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_a_replica_without_the_role_is_refused_and_its_own_push_goes_on(folder, shown, code):
    given = PeerCredentials(**{name: folder / value for name, value in shown.items()}) if shown is not None else None
    async with pair(folder, given) as nodes:
        assert await push(nodes) == [code.value[0]]
        await nodes[0].finish(digest_of(weights()))
