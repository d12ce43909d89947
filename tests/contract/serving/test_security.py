"""TLS, mutual TLS, tokens and roles against a real server, with certificates made for the test."""

import asyncio
import hashlib
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
import yaml
from typer.testing import CliRunner, Result

from steersman.cli.main import app
from steersman.client import AsyncRewardClient, ChannelSettings, Credentials, ScoreItem, SteersmanError
from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.handler import RewardHandler
from steersman.reward.http.app import make_app
from steersman.reward.http.server import start_http
from steersman.reward.servicer import RewardService
from steersman.reward.settings import FunctionScorerSettings
from steersman.serving.metrics import Metrics
from steersman.serving.security.tls import TlsSettings
from steersman.serving.server import check_credentials, make_gate, start_server
from steersman.serving.settings import ServerSettings
from steersman.wire.errors import Reason
from steersman.wire.roles import Role

ITEM = ScoreItem(prompt="a", response="bcd")
ONCE = ChannelSettings(retry_attempts=1)
TIMEOUT = 10


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write_certificate(folder: Path, authority: trustme.CA, *names: str) -> None:
    issued = authority.issue_cert(*names)
    for name, content in (
        ("key", issued.private_key_pem.bytes()),
        ("cert", b"".join(p.bytes() for p in issued.cert_chain_pems)),
    ):
        (folder / f"{name}.pem.new").write_bytes(content)
        (folder / f"{name}.pem.new").replace(folder / f"{name}.pem")


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Path:
    write_certificate(tmp_path, authority, "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    callers = [
        {"name": "scores", "token_sha256": hashlib.sha256(b"good").hexdigest(), "roles": ["score"]},
        {"name": "reads", "token_sha256": hashlib.sha256(b"poor").hexdigest(), "roles": []},
        {"name": "peer", "certificate": "peer.example", "roles": ["score"]},
    ]
    (tmp_path / "callers.yaml").write_text(yaml.safe_dump({"callers": callers}))
    return tmp_path


def settings(files: Path, *, mutual: bool = False, access: bool = True) -> ServerSettings:
    tls = TlsSettings(
        certificate=files / "cert.pem", private_key=files / "key.pem", client_ca=files / "ca.pem" if mutual else None
    )
    return ServerSettings(tls=tls, access_file=files / "callers.yaml" if access else None)


def handler() -> RewardHandler:
    length = FunctionScorer(
        "length", lambda items: [float(len(item.response)) for item in items], FunctionScorerSettings(function="m:f")
    )
    return RewardHandler({"length": length}, "length")


@asynccontextmanager
async def serving(server_settings: ServerSettings) -> AsyncIterator[str]:
    server = await start_server(RewardService(handler()), server_settings, Metrics("reward"))
    try:
        yield server.address
    finally:
        await server.stop()


async def score(address: str, credentials: Credentials | None) -> float:
    async with AsyncRewardClient(address, credentials=credentials, settings=ONCE) as client:
        (found,) = await client.score([ITEM], timeout=TIMEOUT)
        return found.unwrap()


async def refused(address: str, credentials: Credentials | None) -> Reason | None:
    with pytest.raises(SteersmanError) as error:
        await score(address, credentials)
    return error.value.reason


async def test_tokens_and_roles(files, authority):
    root = authority.cert_pem.bytes()
    async with serving(settings(files)) as address:
        assert await score(address, Credentials(root_certificates=root, token="good")) == 3.0
        assert await refused(address, Credentials(root_certificates=root, token="poor")) is Reason.PERMISSION_DENIED
        assert await refused(address, Credentials(root_certificates=root, token="none")) is Reason.UNAUTHENTICATED
        assert await refused(address, Credentials(root_certificates=root)) is Reason.UNAUTHENTICATED
        async with AsyncRewardClient(address, credentials=Credentials(root_certificates=root, token="poor")) as client:
            assert [scorer.name for scorer in await client.scorers()] == ["length"]


async def test_a_caller_in_the_clear_or_of_another_authority_gets_no_connection(files):
    async with serving(settings(files)) as address:
        other = Credentials(root_certificates=trustme.CA().cert_pem.bytes(), token="good")
        for credentials in (None, other):
            assert await refused(address, credentials) is not Reason.UNAUTHENTICATED


async def test_mutual_tls_knows_callers_by_certificate(files, authority):
    root = authority.cert_pem.bytes()

    def identity(name: str) -> Credentials:
        issued = authority.issue_cert(name)
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        return Credentials(root_certificates=root, private_key=issued.private_key_pem.bytes(), certificate_chain=chain)

    async with serving(settings(files, mutual=True)) as address:
        assert await score(address, identity("peer.example")) == 3.0
        assert await refused(address, identity("stranger.example")) is Reason.UNAUTHENTICATED
        # Without a certificate there is no connection, whatever the token.
        assert await refused(address, Credentials(root_certificates=root, token="good")) is not Reason.UNAUTHENTICATED
    async with serving(settings(files, mutual=True, access=False)) as address:
        assert await score(address, identity("stranger.example")) == 3.0


async def test_a_new_certificate_serves_new_connections_without_a_restart(files, authority):
    successor = trustme.CA()
    old = Credentials(root_certificates=authority.cert_pem.bytes(), token="good")
    new = Credentials(root_certificates=successor.cert_pem.bytes(), token="good")
    async with serving(settings(files)) as address:
        assert await score(address, old) == 3.0
        await refused(address, new)
        (files / "cert.pem").write_bytes(b"half")
        assert await score(address, old) == 3.0
        write_certificate(files, successor, "127.0.0.1")
        assert await score(address, new) == 3.0
        await refused(address, old)


async def test_the_http_front_has_the_same_callers(files, authority):
    found = settings(files)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    scorers, gate = handler(), make_gate(found)
    app = make_app(scorers, Metrics("reward"), gate, max_body_bytes=1000, timeout_seconds=5)
    server = await start_http(app, host="127.0.0.1", port=0, max_concurrent_calls=4, grace_seconds=1, tls=found.tls)

    def ask(token: str | None, path: str = "/slime") -> int:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        data = b'{"prompt": "a", "response": "bcd"}' if path == "/slime" else None
        request = urllib.request.Request(f"https://{server.address}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    try:
        statuses = [await asyncio.to_thread(ask, token) for token in ("good", "poor", "none", None)]
        assert statuses == [200, 403, 401, 401]
        assert await asyncio.to_thread(ask, None, "/health") == 200
        assert await asyncio.to_thread(ask, None, "/scorers") == 401
        successor = trustme.CA()
        write_certificate(files, successor, "127.0.0.1")
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(ask, "good")
        successor.configure_trust(context)
        assert await asyncio.to_thread(ask, "good") == 200
    finally:
        await server.stop()
        await scorers.close()


def test_bad_files_are_said_before_anything_starts(files):
    found = settings(files)
    check_credentials(found)
    (files / "key.pem").write_text("no key")
    with pytest.raises(ValueError, match=r"tls.private_key: .* holds no PEM"):
        check_credentials(found)
    (files / "key.pem").write_bytes(trustme.CA().issue_cert("x").private_key_pem.bytes())
    with pytest.raises(ValueError, match=r"tls.certificate: .* do not fit"):
        check_credentials(found)
    (files / "cert.pem").unlink()
    with pytest.raises(ValueError, match=r"tls.certificate: cannot read"):
        check_credentials(found)


@pytest.mark.parametrize(
    ("tls", "mutual", "access", "allowed"),
    [
        (False, False, False, False),
        (False, False, True, False),
        (True, False, False, False),
        (True, True, False, True),
        (True, False, True, True),
    ],
)
def test_beyond_loopback_takes_encryption_and_known_callers(files, tls, mutual, access, allowed):
    found = settings(files, mutual=mutual, access=access)
    given = {"host": "0.0.0.0", "tls": found.tls if tls else None, "access_file": found.access_file}
    if allowed:
        assert ServerSettings(**given).host == "0.0.0.0"
        return
    with pytest.raises(ValueError, match="reachable from outside"):
        ServerSettings(**given)
    assert ServerSettings(**given, insecure=True).insecure


async def command(*arguments: str, **environment: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, list(arguments), None, environment)


async def test_the_command_shows_a_token_or_a_certificate(files, authority, tmp_path):
    inline = ("score", "-p", "a", "-r", "bcd")
    (tmp_path / "token").write_text("good\n")
    trust = ("--ca-file", str(files / "ca.pem"))
    async with serving(settings(files)) as address:
        environment = {"STEERSMAN_REWARD_ADDRESS": address}
        by_file = await command(*trust, "--token-file", str(tmp_path / "token"), *inline, **environment)
        assert json.loads(by_file.stdout)["score"] == 3.0
        by_variable = await command(*trust, *inline, **environment, STEERSMAN_TOKEN="good")
        assert json.loads(by_variable.stdout)["score"] == 3.0
        poor = await command(*trust, *inline, **environment, STEERSMAN_TOKEN="poor")
        assert (poor.exit_code, poor.stdout) == (1, "")
        assert poor.stderr.startswith("error: PERMISSION_DENIED")
        unknown = await command(*trust, *inline, **environment)
        assert unknown.stderr.startswith("error: UNAUTHENTICATED")
        clear = await command(*inline, **environment, STEERSMAN_TOKEN="good")
        assert clear.exit_code == 2
        assert "add --tls" in clear.stderr
        twice = await command("--token-file", str(tmp_path / "token"), *inline, STEERSMAN_TOKEN="good")
        assert twice.exit_code == 2
        for result in (by_file, by_variable, poor, clear, twice):
            assert "good" not in result.stderr
    issued = authority.issue_cert("peer.example")
    issued.private_key_pem.write_to_path(str(tmp_path / "peer.key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "peer.pem"))
    own = ("--cert-file", str(tmp_path / "peer.pem"), "--key-file", str(tmp_path / "peer.key"))
    async with serving(settings(files, mutual=True)) as address:
        by_certificate = await command(*trust, *own, *inline, "--address", address)
        assert json.loads(by_certificate.stdout)["score"] == 3.0, by_certificate.output
    halves = await command(*trust, *own[:2], *inline)
    assert halves.exit_code == 2


async def test_a_token_of_the_command_opens_what_its_entry_says(files, authority):
    made = await command("token", "bench", "--role", "score", "--role", "manage_models")
    assert made.exit_code == 0
    token = made.stdout.strip()
    assert len(token) >= 43
    assert token not in made.stderr
    (files / "callers.yaml").write_text("callers:\n" + made.stderr)
    root = authority.cert_pem.bytes()
    async with serving(settings(files)) as address:
        assert await score(address, Credentials(root_certificates=root, token=token)) == 3.0
        assert await refused(address, Credentials(root_certificates=root, token="good")) is Reason.UNAUTHENTICATED
    wrong = await command("token", "bench", "--role", "dance")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    for role in Role:
        assert role.value in wrong.stderr
