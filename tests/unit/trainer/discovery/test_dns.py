"""Replicas behind a name: what it resolves to, through failures, hangs and servers that tell a part at a time."""

import asyncio
import socket
import threading
from collections.abc import Sequence
from contextlib import aclosing

import pytest

from steersman.trainer.discovery.address import DnsAddress
from steersman.trainer.discovery.dns import DnsDiscovery
from steersman.trainer.discovery.dns import resolve as system_resolve

ADDRESS = DnsAddress("policy.rl", 50051)


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


class Resolver:
    """Answers in order; the last for ever."""

    def __init__(self, *answers: Sequence[str] | OSError) -> None:
        self._answers = list(answers)
        self.num_lookups = 0

    def __call__(self, name: str, port: int) -> Sequence[str]:
        assert (name, port) == ("policy.rl", 50051)
        self.num_lookups += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


async def first(discovery: DnsDiscovery, count: int) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    async with asyncio.timeout(20), aclosing(discovery.targets()) as answers:
        async for targets in answers:
            found.append(targets)
            if len(found) == count:
                break
    return found


async def test_each_change_is_one_answer_sorted_and_without_doubles() -> None:
    resolver = Resolver(["10.0.0.2", "10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"], ["10.0.0.3", "10.0.0.1"])
    discovery = DnsDiscovery(ADDRESS, resolve=resolver, sleep=no_sleep, absences=1)
    assert await first(discovery, 2) == [("10.0.0.1:50051", "10.0.0.2:50051"), ("10.0.0.1:50051", "10.0.0.3:50051")]
    assert resolver.num_lookups == 3


async def test_a_server_that_tells_some_of_many_in_turns_makes_nothing_flap() -> None:
    parts = [["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "10.0.0.3"], ["10.0.0.3", "10.0.0.1"]]
    resolver = Resolver(*parts, *parts, *parts, ["10.0.0.4"])
    found = await first(DnsDiscovery(ADDRESS, resolve=resolver, sleep=no_sleep), 4)
    # All three are found, stay while they are named at times, and go together when they are named no more.
    assert [len(targets) for targets in found] == [2, 3, 4, 3]
    assert resolver.num_lookups > 9


async def test_a_name_that_fails_keeps_its_last_answer_and_says_so() -> None:
    away = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    resolver = Resolver(["10.0.0.1"], away, away, away, away, ["10.0.0.2"])
    problems: list[str] = []
    discovery = DnsDiscovery(ADDRESS, resolve=resolver, absences=1)

    async def note(_: float) -> None:
        problems.append(discovery.problem)

    discovery._sleep = note
    assert await first(discovery, 2) == [("10.0.0.1:50051",), ("10.0.0.2:50051",)]
    assert problems == ["", *["dns:///policy.rl:50051 does not resolve: Name or service not known"] * 4]
    assert discovery.problem == ""


async def test_a_lookup_that_hangs_is_told_at_its_deadline_and_no_second_one_is_started() -> None:
    release = threading.Event()
    num_lookups = 0

    def hang(name: str, port: int) -> Sequence[str]:
        nonlocal num_lookups
        num_lookups += 1
        assert release.wait(20)
        return ["10.0.0.1"]

    discovery = DnsDiscovery(ADDRESS, resolve=hang, deadline_seconds=0.01)
    num_waits = 0

    async def after_three(_: float) -> None:
        nonlocal num_waits
        num_waits += 1
        assert "no answer for 0.01 s" in discovery.problem
        if num_waits == 3:
            release.set()
            discovery._deadline_seconds = 20.0

    discovery._sleep = after_three
    assert await first(discovery, 1) == [("10.0.0.1:50051",)]
    assert (num_lookups, num_waits) == (1, 3)


async def test_one_family_is_used_so_that_no_replica_is_counted_twice() -> None:
    both = Resolver(["fd00::1", "10.0.0.1"])
    assert await first(DnsDiscovery(ADDRESS, resolve=both), 1) == [("10.0.0.1:50051",)]
    narrow = Resolver(["fd00::2", "fd00::1"])
    assert await first(DnsDiscovery(ADDRESS, resolve=narrow), 1) == [("[fd00::1]:50051", "[fd00::2]:50051")]


async def test_a_defect_of_the_resolver_is_not_taken_for_an_absent_name() -> None:
    def broken(name: str, port: int) -> Sequence[str]:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        await first(DnsDiscovery(ADDRESS, resolve=broken), 1)


def test_the_resolver_of_the_system_finds_this_machine() -> None:
    assert "127.0.0.1" in system_resolve("localhost", 50051)
