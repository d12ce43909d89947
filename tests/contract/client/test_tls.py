"""TLS, mutual TLS and the bearer token, with certificates made for the test."""

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from steersman.client import AsyncPolicyClient, ChannelSettings, Credentials
from steersman.v1 import policy_pb2, policy_pb2_grpc
from steersman.wire.errors import Code, SteersmanError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")
ONCE = ChannelSettings(retry_attempts=1)


class FakePolicy(policy_pb2_grpc.PolicyServiceServicer):
    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}

    async def GetModel(self, request: Any, context: Any) -> policy_pb2.PolicyServiceGetModelResponse:
        self.metadata = dict(context.invocation_metadata())
        response = policy_pb2.PolicyServiceGetModelResponse()
        response.model.dtype = 1
        return response


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Key and self-signed certificate of `policy.test`, in PEM."""
    folder: Path = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=policy.test "
        "-addext subjectAltName=DNS:policy.test -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True, timeout=60)
    return (folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes()


@pytest.fixture
async def mutual(identity: tuple[bytes, bytes]) -> AsyncIterator[tuple[str, FakePolicy]]:
    """A server that wants a client certificate."""
    server, fake = grpc.aio.server(), FakePolicy()
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(fake, server)
    secret = grpc.ssl_server_credentials([identity], root_certificates=identity[1], require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", secret)
    await server.start()
    yield f"127.0.0.1:{port}", fake
    await server.stop(None)


async def test_both_sides_prove_themselves_and_the_token_travels(mutual: Any, identity: tuple[bytes, bytes]) -> None:
    address, fake = mutual
    key, certificate = identity
    credentials = Credentials(
        root_certificates=certificate,
        private_key=key,
        certificate_chain=certificate,
        token="open-sesame",
        server_name="policy.test",
    )
    async with AsyncPolicyClient(address, credentials=credentials, settings=ONCE) as client:
        await client.model()
    assert fake.metadata["authorization"] == "Bearer open-sesame"


async def test_a_client_without_certificate_or_without_tls_gets_nothing(
    mutual: Any, identity: tuple[bytes, bytes]
) -> None:
    address, fake = mutual
    for credentials in (None, Credentials(root_certificates=identity[1], server_name="policy.test")):
        async with AsyncPolicyClient(address, credentials=credentials, settings=ONCE) as client:
            with pytest.raises(SteersmanError) as caught:
                await client.model(timeout=10.0)
        assert caught.value.code is Code.UNAVAILABLE
    assert fake.metadata == {}
