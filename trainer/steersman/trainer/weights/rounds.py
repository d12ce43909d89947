"""Brings together the recipients of the same cargo, for a delivery that sends to them together.

A round opens with its first recipient and starts when every replica that is expected has come or been excused, or when
`Delivery.gather_seconds` have passed: one that is late gets a round of its own. Where nothing is gathered each
recipient is a round.
"""

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from steersman.trainer.weights.cargo import Cargo
from steersman.trainer.weights.delivery import Delivered, Delivery, Recipient
from steersman.wire.errors import unavailable


@dataclass(kw_only=True)
class _Round:
    cargo: Cargo
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    recipients: dict[str, Recipient] = field(default_factory=dict)
    results: dict[str, "asyncio.Future[Delivered]"] = field(default_factory=dict)
    task: "asyncio.Task[None] | None" = None


class Rounds:
    """Sends cargo to one recipient after the other by as few deliveries as may be. Lives on one event loop."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._expected: set[str] = set()
        self._open: dict[Cargo, _Round] = {}

    def expect(self, targets: Iterable[str]) -> None:
        """Says that these will come, or be excused, soon."""
        self._expected = set(targets)

    def excuse(self, target: str) -> None:
        """Says that this one will not come, or not soon."""
        self._expected.discard(target)
        self._start_if_all_came()

    async def send(self, cargo: Cargo, recipient: Recipient) -> Delivered:
        """How the delivery to this recipient went. Cancelling it gives up the whole round once nobody waits for it."""
        self._expected.discard(recipient.target)
        current = self._open.get(cargo)
        if current is None or recipient.target in current.recipients:
            current = _Round(cargo=cargo)
            current.task = asyncio.create_task(self._run(current))
            if self._delivery.gather_seconds:
                self._open[cargo] = current
        result: asyncio.Future[Delivered] = asyncio.get_running_loop().create_future()
        current.recipients[recipient.target], current.results[recipient.target] = recipient, result
        self._start_if_all_came()
        try:
            return await result
        except asyncio.CancelledError:
            if current.task is not None and all(one.done() for one in current.results.values()):
                current.task.cancel()
            raise

    def _start_if_all_came(self) -> None:
        if not self._expected:
            for current in self._open.values():
                current.complete.set()

    async def _run(self, current: _Round) -> None:
        try:
            if self._delivery.gather_seconds:
                await self._gather(current)
            recipients = [one for target, one in current.recipients.items() if not current.results[target].done()]
            async for delivered in self._delivery.deliver(current.cargo, recipients):
                _settle(current.results[delivered.target], delivered)
        except Exception as error:
            for result in current.results.values():
                if not result.done():
                    result.set_exception(error)
        finally:
            self._close(current)
            for target, result in current.results.items():
                _settle(result, Delivered(target=target, error=unavailable("the delivery ended without it")))

    async def _gather(self, current: _Round) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(current.complete.wait(), self._delivery.gather_seconds)
        self._close(current)

    def _close(self, current: _Round) -> None:
        if self._open.get(current.cargo) is current:
            del self._open[current.cargo]


def _settle(result: "asyncio.Future[Delivered]", delivered: Delivered) -> None:
    if not result.done():
        result.set_result(delivered)
