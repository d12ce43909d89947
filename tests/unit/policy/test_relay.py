"""Routes that a replica refuses, before it dials anybody, and how patient a link is."""

import pytest

from steersman.policy.weights.relay import Patience, RelayRules
from steersman.v1 import weights_pb2
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.limits import MAX_RELAY_DEPTH, MAX_RELAY_FAN_OUT, MAX_RELAY_HOPS

OWN = "own-push"
Hop = weights_pb2.RelayHop


def hop(number: int, *behind: Hop) -> Hop:
    return Hop(target=f"10.0.0.1:{number + 1}", push_id=f"push-{number}", next=behind)


def chain(length: int, first: int = 0) -> Hop:
    found = hop(first + length - 1)
    for number in reversed(range(first, first + length - 1)):
        found = hop(number, found)
    return found


def largest() -> list[Hop]:
    """As many hops as there may be, as deep and as wide."""
    return [chain(MAX_RELAY_DEPTH, first) for first in range(0, MAX_RELAY_HOPS, MAX_RELAY_DEPTH)]


def beyond() -> list[Hop]:
    hops = largest()
    hops[0].next.append(hop(MAX_RELAY_HOPS))
    return hops


def refusal(hops: list[Hop], rules: RelayRules | None = None) -> SteersmanError:
    with pytest.raises(SteersmanError) as caught:
        (rules or RelayRules()).check(hops, OWN)
    return caught.value


@pytest.mark.parametrize(
    "hops",
    [
        [],
        [hop(1)],
        [chain(MAX_RELAY_DEPTH)],
        [hop(number) for number in range(MAX_RELAY_FAN_OUT)],
        largest(),
        [Hop(target="[fd00::1]:50051", push_id="a"), Hop(target="policy-3.policy.svc:50051", push_id="b")],
    ],
)
def test_routes_within_the_limits_are_taken(hops: list[Hop]) -> None:
    RelayRules().check(hops, OWN)


@pytest.mark.parametrize(
    ("hops", "field", "allowed"),
    [
        ([hop(1, hop(2, hop(1)))], "relay[0].next[0].next[0].target", "each replica once"),
        ([hop(1), hop(2), hop(1)], "relay[2].target", "each replica once"),
        # The replica itself, under whatever name: it is known by the push that it has opened.
        ([hop(1, Hop(target="alias:1", push_id=OWN))], "relay[0].next[0].push_id", "each once"),
        ([Hop(target="a:1", push_id="p"), Hop(target="b:1", push_id="p")], "relay[1].push_id", "each once"),
        ([Hop(target="a:1")], "relay[0].push_id", "the push of that replica"),
        ([chain(MAX_RELAY_DEPTH + 1)], "relay", f"at most {MAX_RELAY_DEPTH}"),
        ([hop(number) for number in range(MAX_RELAY_FAN_OUT + 1)], "relay", f"at most {MAX_RELAY_FAN_OUT}"),
        (
            [hop(99, *(hop(number) for number in range(MAX_RELAY_FAN_OUT + 1)))],
            "relay[0].next",
            f"at most {MAX_RELAY_FAN_OUT}",
        ),
        (beyond(), "relay", f"at most {MAX_RELAY_HOPS}"),
        ([Hop(target="no-port", push_id="a")], "relay[0].target", "host:port"),
        ([Hop(target="a:0", push_id="a")], "relay[0].target", "1 to 65535"),
        ([Hop(target="a:65536", push_id="a")], "relay[0].target", "1 to 65535"),
        ([Hop(target="a:1,b:2", push_id="a")], "relay[0].target", "host:port"),
        ([Hop(target="unix:/run/a.sock", push_id="a")], "relay[0].target", "host:port"),
        ([Hop(target="dns:///a:1", push_id="a")], "relay[0].target", "host:port"),
        ([Hop(target="a:1/../x", push_id="a")], "relay[0].target", "host:port"),
    ],
)
def test_bad_routes_are_refused_by_the_path_of_the_hop(hops: list[Hop], field: str, allowed: str) -> None:
    error = refusal(hops)
    assert error.reason is Reason.INVALID_FIELD
    [violation] = error.violations
    assert violation.field == field
    assert allowed in violation.description


def test_a_replica_relays_only_where_it_may() -> None:
    rules = RelayRules(targets=("10.1.*:50051", "policy-?.policy:50051"))
    rules.check([Hop(target="10.1.2.3:50051", push_id="a"), Hop(target="policy-7.policy:50051", push_id="b")], OWN)
    for target in ("10.2.0.1:50051", "10.1.2.3:22", "policy-77.policy:50051", "169.254.169.254:80"):
        error = refusal([Hop(target=target, push_id="a")], rules)
        assert error.reason is Reason.PERMISSION_DENIED
        assert target in error.message
    assert refusal([hop(1)], RelayRules(enabled=False)).reason is Reason.PERMISSION_DENIED


def test_a_link_that_stands_still_has_the_stall_time() -> None:
    assert Patience(10.0, now=100.0).left(100.0) == 10.0
    assert Patience(10.0, now=100.0).left(1000.0) == 10.0


def test_a_slow_link_may_take_as_long_as_the_stream_without_it() -> None:
    patience, now = Patience(10.0, now=0.0), 0.0
    for _ in range(100):  # a third of the time
        now += 2.0
        assert patience.left(now) == 10.0
        patience.spend(1.0)
        now += 1.0
    for waited in range(110):  # then all of it: what it has not used, and the stall time
        assert patience.left(now) == min(10.0, 110.0 - waited)
        patience.spend(1.0)
        now += 1.0
    assert patience.left(now) == 0.0
