"""Several sources as one."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from steersman.trainer.discovery.dns import DnsDiscovery
from steersman.trainer.discovery.fallback import WithFallback
from steersman.trainer.discovery.ports import DiscoveryRefused, Targets
from steersman.trainer.discovery.static import StaticDiscovery
from steersman.trainer.discovery.union import UnionDiscovery, discover


class Told:
    """Finds what it is told, or fails with it."""

    def __init__(self, problem: str = "") -> None:
        self.name = "told"
        self.problem = problem
        self.news: asyncio.Queue[Targets | Exception] = asyncio.Queue()
        self.closed = False

    async def targets(self) -> AsyncGenerator[Targets, None]:
        try:
            while True:
                item = await self.news.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


async def test_a_list_is_told_once_and_ends() -> None:
    one = discover(["b:1", "a:1", "b:1"], default_port=1)
    assert isinstance(one, StaticDiscovery)
    assert [targets async for targets in one.targets()] == [("b:1", "a:1")]
    assert (one.name, one.problem) == ("b:1, a:1", "")


def test_the_kind_of_an_address_is_the_kind_of_its_source() -> None:
    assert isinstance(discover(["dns:///policy:1"], default_port=1), DnsDiscovery)
    assert isinstance(discover(["k8s:///policy"], default_port=1), WithFallback)
    assert discover(["a:1", "k8s:///policy", "b:1"], default_port=1).name == "a:1, b:1, k8s:///policy"
    with pytest.raises(ValueError, match="allowed: host:port"):
        discover(["policy"], default_port=1)


async def test_what_one_knows_is_told_at_once_and_joined_with_the_others() -> None:
    first, second = Told(), Told(problem="second is away")
    union = UnionDiscovery([StaticDiscovery(["s:1"]), first, second])
    async with asyncio.timeout(20), aclosing(union.targets()) as answers:
        assert await anext(answers) == ("s:1",)
        first.news.put_nowait(("a:1",))
        assert await anext(answers) == ("a:1", "s:1")
        second.news.put_nowait(("b:1", "a:1"))
        assert await anext(answers) == ("a:1", "b:1", "s:1")
        first.news.put_nowait(())  # the second still shows a:1: nothing changes
        second.news.put_nowait(("b:1",))
        assert await anext(answers) == ("b:1", "s:1")
        assert union.problem == "second is away"
    assert first.closed
    assert second.closed


async def test_a_source_that_is_refused_ends_the_union() -> None:
    first, second = Told(), Told()
    async with asyncio.timeout(20), aclosing(UnionDiscovery([first, second]).targets()) as answers:
        first.news.put_nowait(("a:1",))
        assert await anext(answers) == ("a:1",)
        second.news.put_nowait(DiscoveryRefused("no right to list"))
        with pytest.raises(DiscoveryRefused, match="no right to list"):
            await anext(answers)
    assert first.closed


async def test_a_union_of_lists_ends_with_them() -> None:
    union = UnionDiscovery([StaticDiscovery(["a:1"]), StaticDiscovery(["b:1"])])
    async with asyncio.timeout(20):
        answers = [targets async for targets in union.targets()]
    assert answers[-1] == ("a:1", "b:1")
