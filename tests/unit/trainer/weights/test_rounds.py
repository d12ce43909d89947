"""Who is delivered to together."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from steersman.trainer.weights.cargo import Cargo
from steersman.trainer.weights.delivery import Delivered, Recipient
from steersman.trainer.weights.rounds import Rounds
from steersman.wire.errors import SteersmanError, unavailable


@dataclass(frozen=True)
class Port:
    target: str


@dataclass
class FakeDelivery:
    """Notes who came together. `hold` keeps deliveries from ending."""

    gather_seconds: float = 600.0
    rounds: list[list[str]] = field(default_factory=list)
    errors: dict[str, SteersmanError] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    hold: asyncio.Event | None = None
    num_cancelled: int = 0

    async def deliver(self, cargo: Cargo, recipients: Sequence[Recipient]) -> AsyncIterator[Delivered]:
        self.rounds.append([one.target for one in recipients])
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        for one in recipients:
            if one.target not in self.skipped:
                yield Delivered(target=one.target, sent_bytes=len(recipients), error=self.errors.get(one.target))


def recipient(target: str) -> Recipient:
    async def reopen() -> str:
        return "again"

    return Recipient(port=Port(target), push_id=target, reopen=reopen)


def sending(rounds: Rounds, *targets: str, cargo: str = "cargo") -> list["asyncio.Task[Delivered]"]:
    return [asyncio.create_task(rounds.send(cargo, recipient(target))) for target in targets]


async def test_all_that_are_expected_are_delivered_to_together() -> None:
    delivery = FakeDelivery()
    rounds = Rounds(delivery)
    rounds.expect("abc")
    first = sending(rounds, "a", "b")
    await asyncio.sleep(0)
    assert delivery.rounds == []
    results = await asyncio.gather(*first, *sending(rounds, "c"))
    assert delivery.rounds == [["a", "b", "c"]]
    assert [one.target for one in results] == ["a", "b", "c"]


async def test_one_that_is_excused_is_not_waited_for() -> None:
    delivery = FakeDelivery()
    rounds = Rounds(delivery)
    rounds.expect("abc")
    tasks = sending(rounds, "a", "b")
    await asyncio.sleep(0)
    rounds.excuse("c")
    await asyncio.gather(*tasks)
    assert delivery.rounds == [["a", "b"]]


async def test_one_that_is_late_gets_a_round_of_its_own() -> None:
    delivery = FakeDelivery(gather_seconds=0.01)
    rounds = Rounds(delivery)
    rounds.expect("ab")
    await asyncio.gather(*sending(rounds, "a"))
    await asyncio.gather(*sending(rounds, "b"))
    assert delivery.rounds == [["a"], ["b"]]


async def test_where_nobody_is_expected_and_where_nothing_is_gathered_each_starts_at_once() -> None:
    for delivery in (FakeDelivery(), FakeDelivery(gather_seconds=0.0)):
        rounds = Rounds(delivery)
        if not delivery.gather_seconds:
            rounds.expect("abc")
        await asyncio.gather(*sending(rounds, "a"))
        assert delivery.rounds == [["a"]]


async def test_another_cargo_is_another_round() -> None:
    delivery = FakeDelivery()
    rounds = Rounds(delivery)
    rounds.expect("abc")
    await asyncio.gather(*sending(rounds, "a", "c"), *sending(rounds, "b", cargo="other"))
    assert sorted(delivery.rounds) == [["a", "c"], ["b"]]


async def test_what_went_wrong_is_told_to_the_one_that_it_concerns() -> None:
    delivery = FakeDelivery(errors={"b": unavailable("away")}, skipped={"c"})
    rounds = Rounds(delivery)
    rounds.expect("abc")
    a, b, c = await asyncio.gather(*sending(rounds, "a", "b", "c"))
    assert a.error is None
    assert b.error is delivery.errors["b"]
    assert "ended without it" in str(c.error)


async def test_a_round_goes_on_without_one_that_left_and_ends_when_all_have_left() -> None:
    delivery = FakeDelivery(hold=asyncio.Event())
    rounds = Rounds(delivery)
    rounds.expect("ab")
    a, b = sending(rounds, "a", "b")
    while not delivery.rounds:
        await asyncio.sleep(0)
    a.cancel()
    await asyncio.gather(a, return_exceptions=True)
    assert delivery.num_cancelled == 0
    b.cancel()
    await asyncio.gather(a, b, return_exceptions=True)
    while not delivery.num_cancelled:
        await asyncio.sleep(0)


async def test_a_defect_of_a_delivery_reaches_all() -> None:
    class Broken(FakeDelivery):
        async def deliver(self, cargo, recipients):
            raise RuntimeError("defect")
            yield

    rounds = Rounds(Broken())
    rounds.expect("ab")
    for result in await asyncio.gather(*sending(rounds, "a", "b"), return_exceptions=True):
        with pytest.raises(RuntimeError, match="defect"):
            raise result
