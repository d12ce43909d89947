"""Which endpoints count, by what the API says of EndpointSlice."""

from typing import Any

import pytest
from slice_objects import endpoint, endpoint_slice

from steersman.trainer.discovery.slices import read_slices


def targets(*slices: dict[str, Any], port: str | int | None = None) -> tuple[str, ...]:
    return read_slices(slices, port).targets


@pytest.mark.parametrize(
    ("conditions", "usable"),
    [
        ({"ready": True, "serving": True, "terminating": False}, True),
        ({"ready": False, "serving": False, "terminating": False}, False),
        ({"ready": False, "serving": True, "terminating": True}, False),
        ({"ready": True, "serving": True, "terminating": True}, False),  # publishNotReadyAddresses
        ({"ready": None}, True),
        ({}, True),
        (None, True),
    ],
)
def test_ready_or_unknown_and_not_terminating(conditions: dict[str, bool | None] | None, usable: bool) -> None:
    one = endpoint_slice("a", [{"addresses": ["10.0.0.1"], "conditions": conditions}])
    found = read_slices([one], None)
    assert found.targets == (("10.0.0.1:50051",) if usable else ())
    assert found.num_unready == (0 if usable else 1)
    assert found.problem == ""


def test_slices_of_one_service_are_one_list_and_an_endpoint_in_two_counts_once() -> None:
    first = endpoint_slice("a", [endpoint("10.0.0.2"), endpoint("10.0.0.1")])
    second = endpoint_slice("b", [endpoint("10.0.0.2"), endpoint("10.0.0.3")])
    assert targets(first, second) == ("10.0.0.1:50051", "10.0.0.2:50051", "10.0.0.3:50051")


def test_lists_may_be_null_or_left_out() -> None:
    empty = {"metadata": {"name": "a"}, "addressType": "IPv4", "endpoints": None, "ports": None}
    assert targets(empty, {"metadata": {"name": "b"}, "addressType": "IPv4"}) == ()


def test_slices_may_differ_in_their_ports() -> None:
    # A named target port may have another number in the pods of a new revision.
    old = endpoint_slice("a", [endpoint("10.0.0.1")], ports=[("grpc", 50051)])
    new = endpoint_slice("b", [endpoint("10.0.0.2")], ports=[("grpc", 50061)])
    assert targets(old, new, port="grpc") == ("10.0.0.1:50051", "10.0.0.2:50061")


@pytest.mark.parametrize(
    ("ports", "wanted", "number"),
    [
        ([("", 50051)], None, 50051),
        ([("anything", 50051)], None, 50051),
        ([("metrics", 9090), ("grpc", 50051)], None, 50051),
        ([("metrics", 9090), ("grpc", 50051)], "metrics", 9090),
        ([("metrics", 9090), ("grpc", 50051)], 9090, 9090),
        ([], 50051, 50051),
    ],
)
def test_the_port(ports: list[tuple[str, int]], wanted: str | int | None, number: int) -> None:
    assert targets(endpoint_slice("a", [endpoint("10.0.0.1")], ports=ports), port=wanted) == (f"10.0.0.1:{number}",)


@pytest.mark.parametrize(
    ("ports", "wanted", "message"),
    [
        ([("metrics", 9090), ("http", 80)], None, "port is not said, the pods' ports are metrics=9090, http=80"),
        ([("grpc", 50051)], "grcp", "port is grcp, the pods' ports are grpc=50051"),
        ([("grpc", 50051)], 80, "port is 80, the pods' ports are grpc=50051"),
        ([], None, "port is not said, the pods' ports are none"),
    ],
)
def test_a_port_that_is_not_there_is_told_with_those_that_are(
    ports: list[tuple[str, int]], wanted: str | int | None, message: str
) -> None:
    found = read_slices([endpoint_slice("policy-x7", [endpoint("10.0.0.1")], ports=ports)], wanted)
    assert found.targets == ()
    assert found.problem.startswith(f"EndpointSlice policy-x7: {message}")


def test_udp_ports_do_not_count() -> None:
    one = endpoint_slice("a", [endpoint("10.0.0.1")])
    one["ports"].append({"name": "dns", "port": 53, "protocol": "UDP"})
    assert targets(one) == ("10.0.0.1:50051",)


def test_of_two_families_one_is_used() -> None:
    narrow = endpoint_slice("a", [endpoint("10.0.0.1")])
    wide = endpoint_slice("b", [endpoint("fd00::1")], family="IPv6")
    assert targets(narrow, wide) == ("10.0.0.1:50051",)
    assert targets(wide) == ("[fd00::1]:50051",)
