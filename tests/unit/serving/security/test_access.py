import hashlib
from pathlib import Path

import pytest
import yaml

from steersman.serving.security import access
from steersman.serving.security.access import AccessList, Caller, authorize, bearer_token
from steersman.serving.security.gate import Gate
from steersman.serving.security.roles import ROLE_OF
from steersman.v1 import policy_pb2, reference_pb2, reward_model_pb2, reward_pb2, trainer_pb2, weights_pb2
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.roles import Role

SCORE, PUSH, LIST = (
    "/steersman.v1.RewardService/Score",
    "/steersman.v1.WeightService/PushChunks",
    "/steersman.v1.RewardService/ListScorers",
)


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture(autouse=True)
def looks_every_time(monkeypatch):
    monkeypatch.setattr(access, "_LOOK_SECONDS", 0.0)


@pytest.fixture
def write(tmp_path):
    def write(*callers: dict) -> Path:
        path = tmp_path / "callers.yaml"
        replacement = tmp_path / "new"
        replacement.write_text(yaml.safe_dump({"callers": list(callers)}))
        replacement.replace(path)
        return path

    return write


def test_every_method_of_every_service_has_an_entry_and_no_entry_is_left_over():
    from steersman.reward.compat import open_inference_pb2, tei_pb2

    files = (
        policy_pb2,
        weights_pb2,
        reference_pb2,
        reward_pb2,
        reward_model_pb2,
        trainer_pb2,
        open_inference_pb2,
        tei_pb2,
    )
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == set(ROLE_OF)


def test_only_the_role_of_pushing_changes_weights():
    changing = {"BeginPush", "PushChunks", "Stage", "Activate", "Rollback", "AbortPush"}
    found = {path.rpartition("/")[2] for path, role in ROLE_OF.items() if role is Role.PUSH_WEIGHTS}
    assert found == changing


def test_callers_are_known_by_token_or_certificate(write):
    path = write(
        {"name": "trainer", "token_sha256": sha256("secret"), "roles": ["score", "push_weights"]},
        {"name": "reader", "certificate": "reader.example", "roles": []},
    )
    found = AccessList(path)
    trainer = found.find("secret", ())
    assert trainer == Caller(name="trainer", roles=frozenset({Role.SCORE, Role.PUSH_WEIGHTS}))
    reader = found.find(None, ["other", "reader.example"])
    assert reader is not None
    assert reader.name == "reader"
    assert found.find(None, ["other"]) is None
    # A wrong token is not made good by a certificate.
    assert found.find("wrong", ["reader.example"]) is None
    assert found.find("", ()) is None


def test_the_file_is_read_again_and_a_broken_one_changes_nothing(write, caplog):
    path = write({"name": "a", "token_sha256": sha256("one"), "roles": []})
    found = AccessList(path)
    write({"name": "a", "token_sha256": sha256("two"), "roles": []})
    assert found.find("one", ()) is None
    assert found.find("two", ()) is not None
    path.write_text("callers: [")
    assert found.find("two", ()) is not None
    assert "stays as it was" in caplog.text
    path.unlink()
    assert found.find("two", ()) is not None
    write({"name": "a", "token_sha256": sha256("three"), "roles": []})
    assert found.find("three", ()) is not None


@pytest.mark.parametrize(
    ("callers", "words"),
    [
        ([], "callers"),
        ([{"name": "a", "roles": []}], "token_sha256, certificate"),
        ([{"name": "a", "token_sha256": "short", "roles": []}], "token_sha256"),
        ([{"name": "a", "certificate": "x", "roles": ["fly"]}], "roles"),
        ([{"name": "a", "certificate": "x", "roles": [], "token": "secret"}], "token"),
        ([{"name": "a", "certificate": x, "roles": []} for x in "xy"], "'a' is there twice"),
    ],
)
def test_a_bad_file_is_refused(write, callers, words):
    with pytest.raises(ValueError, match="access_file") as error:
        AccessList(write(*callers))
    assert words in str(error.value)
    with pytest.raises(ValueError, match="cannot read"):
        AccessList(Path("/nowhere/callers.yaml"))


def test_what_a_caller_may_do():
    caller = Caller(name="a", roles=frozenset({Role.SCORE}))
    assert authorize(SCORE, caller) is caller
    assert authorize(LIST, caller) is caller
    for method, words in ((PUSH, "push_weights"), ("/steersman.v1.New/Method", "open to nobody")):
        with pytest.raises(SteersmanError, match=words) as error:
            authorize(method, caller)
        assert error.value.reason is Reason.PERMISSION_DENIED
    with pytest.raises(SteersmanError) as error:
        authorize(LIST, None)
    assert error.value.reason is Reason.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("header", "token"), [(None, None), ("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("Basic abc", ""), ("", "")]
)
def test_bearer_tokens(header, token):
    assert bearer_token(header) == token


def test_a_caller_has_so_many_calls_and_gives_them_back():
    gate = Gate(max_calls_per_caller=2)

    def admit(address: str):
        return gate.admit(SCORE, token=None, certificate_names=(), address=address)

    with admit("a") as name, admit("a"), admit("b"):
        assert name == "a"
        with pytest.raises(SteersmanError) as error, admit("a"):
            pass
        assert error.value.reason is Reason.QUEUE_FULL
        assert error.value.retry_after_seconds
    with admit("a"), admit("a"):
        pass
