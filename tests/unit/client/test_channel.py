"""Targets, service config and credentials."""

import json
from typing import Any

import pytest

from steersman.client.channel import ChannelSettings, Credentials, channel_options, resolve_target, service_config
from steersman.v1 import policy_pb2, reference_pb2, reward_model_pb2, reward_pb2, trainer_pb2, weights_pb2
from steersman.wire.errors import SteersmanError

HOSTS = {"a": ["10.0.0.1", "fd00::1"], "b": ["10.0.0.2"], "six": ["fd00::2"]}


def resolve(host: str, port: int) -> list[str]:
    return HOSTS[host]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("localhost:50051", "localhost:50051"),
        (" localhost:50051 ", "localhost:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("dns:///policy.rlhf.svc:50051", "dns:///policy.rlhf.svc:50051"),
        ("ipv4:1.2.3.4:5,6.7.8.9:10", "ipv4:1.2.3.4:5,6.7.8.9:10"),
        ("unix:/run/policy.sock", "unix:/run/policy.sock"),
        ("1.2.3.4:5,6.7.8.9:10", "ipv4:1.2.3.4:5,6.7.8.9:10"),
        ("a:1, b:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("[fd00::3]:1,six:2", "ipv6:[fd00::3]:1,[fd00::2]:2"),
    ],
)
def test_targets(target: str, expected: str) -> None:
    assert resolve_target(target, resolve) == expected


@pytest.mark.parametrize("target", ["", "localhost", "localhost:", "localhost:http", "localhost:70000", "a:1,", ":1"])
def test_bad_targets_are_named(target: str) -> None:
    with pytest.raises(SteersmanError, match=r"target is .* allowed: host:port"):
        resolve_target(target, resolve)


def test_a_list_of_both_families_is_refused() -> None:
    with pytest.raises(SteersmanError, match="one family"):
        resolve_target("b:1,six:2", resolve)


def test_a_host_in_a_list_that_does_not_resolve_is_named() -> None:
    with pytest.raises(SteersmanError, match=r"no-such-host\.invalid"):
        resolve_target("no-such-host.invalid:1,127.0.0.1:2")


def test_retries_are_for_unavailable_and_for_methods_that_exist() -> None:
    config: dict[str, Any] = json.loads(service_config(ChannelSettings()))
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    (method_config,) = config["methodConfig"]
    assert method_config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    files = (policy_pb2, reference_pb2, reward_pb2, reward_model_pb2, trainer_pb2, weights_pb2)
    known = {
        (service.full_name, method.name)
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    retried = {(name["service"], name["method"]) for name in method_config["name"]}
    assert retried <= known
    assert ("steersman.v1.TrainerService", "CreateJob") not in retried
    assert ("steersman.v1.WeightService", "PushChunks") not in retried
    assert not [name for name in retried if name[1] in ("WatchJob", "StreamScore", "BeginPush", "ResumeJob")]


def test_one_attempt_means_no_retry_policy() -> None:
    assert "methodConfig" not in json.loads(service_config(ChannelSettings(retry_attempts=1)))
    for attempts in (0, 6):
        with pytest.raises(ValueError, match="retry_attempts"):
            ChannelSettings(retry_attempts=attempts)


def test_a_large_request_can_be_retried() -> None:
    options = dict(channel_options(ChannelSettings(max_message_bytes=12345), None))
    assert options["grpc.per_rpc_retry_buffer_size"] == 12345
    assert options["grpc.max_receive_message_length"] == 12345


def test_credentials() -> None:
    assert Credentials(tls=False).to_grpc() is None
    assert Credentials(token="secret").to_grpc() is not None
    assert "secret" not in repr(Credentials(token="secret", private_key=b"secret", certificate_chain=b""))
    with pytest.raises(ValueError, match="both or neither"):
        Credentials(private_key=b"key")
    with pytest.raises(ValueError, match="only over TLS"):
        Credentials(tls=False, token="secret")
    options = dict(channel_options(ChannelSettings(), Credentials(server_name="policy.rlhf")))
    assert options["grpc.ssl_target_name_override"] == "policy.rlhf"
