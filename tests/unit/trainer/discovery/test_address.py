"""What an address means, and what is said of one that means nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.trainer.discovery.address import DnsAddress, ServiceAddress, StaticAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", StaticAddress("127.0.0.1:50051")),
        (" policy-0.policy:50051 ", StaticAddress("policy-0.policy:50051")),
        ("[::1]:50051", StaticAddress("[::1]:50051")),
        ("unix:/run/policy.sock", StaticAddress("unix:/run/policy.sock")),
        ("unix:///run/policy.sock", StaticAddress("unix:///run/policy.sock")),
        ("dns:///policy.rl.svc.cluster.local:50051", DnsAddress("policy.rl.svc.cluster.local", 50051)),
        ("k8s:///policy", ServiceAddress("policy")),
        ("k8s:///policy:grpc", ServiceAddress("policy", port="grpc")),
        ("k8s:///rl/policy", ServiceAddress("policy", "rl")),
        ("k8s:///rl/policy:50051", ServiceAddress("policy", "rl", 50051)),
        ("k8s:///2024/policy:http2-grpc", ServiceAddress("policy", "2024", "http2-grpc")),
    ],
)
def test_what_an_address_means(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "host:port"),
        ("policy", "host:port"),
        (":50051", "host:port"),
        ("policy:0", r"a port from 1 to 65535; the port is '0'"),
        ("policy:65536", "65535"),
        ("policy:http", r"is 'policy:http', allowed: host:port"),
        ("policy:\u0665\u0660", "allowed: host:port"),
        ("::1:50051", "IPv6 addresses in brackets"),
        ("[::g]:50051", "an IPv6 address in brackets"),
        ("a:1,b:2", "one replica; give each of several as an item of its own"),
        ("a b:1", "the host is 'a b'"),
        ("http://policy:50051", "host:port, unix:PATH"),
        ("ipv4:10.0.0.1:1", "host:port"),
        ("xds:///policy", "host:port"),
        ("dns:policy:50051", "with three slashes"),
        ("dns://8.8.8.8/policy:50051", "no name server"),
        ("dns:///policy", "dns:///NAME:PORT"),
        ("dns:///a/b:50051", "the name is 'a/b'|the host is 'a/b'"),
        ("k8s:policy", "with three slashes"),
        ("k8s://rl/policy", "with three slashes"),
        ("k8s:///", "the Service is ''"),
        ("k8s:///rl/", "the Service is ''"),
        ("k8s:///Rl/policy", "the namespace is 'Rl'"),
        ("k8s:////policy", "the namespace is ''"),
        ("k8s:///a/b/c", "the namespace is 'a/b'"),
        ("k8s:///rl/9policy", "the Service is '9policy'"),
        ("k8s:///rl/" + "p" * 64, "the Service is"),
        ("k8s:///rl/policy:", "the port is ''"),
        ("k8s:///rl/policy:70000", "65535"),
        ("k8s:///rl/policy:a-name-of-sixteen", "at most 15"),
        ("k8s:///rl/policy:GRPC", "at most 15 small letters"),
    ],
)
def test_what_means_nothing_is_refused_with_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        parse_address(text)
    assert repr(text) in str(raised.value)


@given(st.text(max_size=40) | st.text("k8s:/dn[]0a-.,", max_size=20))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    # What was understood is written in one way, and understood again.
    again = address.target if isinstance(address, StaticAddress) else str(address)
    assert parse_address(again) == address
