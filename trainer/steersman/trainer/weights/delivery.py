"""How the chunks of a push get to the replicas that have opened one for them.

`Delivery` is the seam: the publisher opens the pushes before and stages them after, a delivery carries what lies
between. `DirectDelivery` sends each replica a stream of its own; `relay` lets replicas pass it on.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from steersman.trainer.weights.cargo import Cargo
from steersman.trainer.weights.ports import WeightPort
from steersman.wire.errors import SteersmanError


@dataclass(frozen=True, kw_only=True)
class Recipient:
    """A replica with a push that waits for its chunks. `reopen` begins it anew, where its stream broke and took it
    along, and returns the id of the new one.
    """

    port: WeightPort
    push_id: str
    reopen: Callable[[], Awaitable[str]]

    @property
    def target(self) -> str:
        """Which replica."""
        return self.port.target


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """How it went at one replica.

    Attributes:
        target: which.
        sent_bytes: chunk data that left this process for its sake; 0 where another replica passed it on.
        error: why not all chunks arrived; None if they did.
    """

    target: str
    sent_bytes: int = 0
    error: SteersmanError | None = None


class Delivery(Protocol):
    """Carries chunks to replicas."""

    @property
    def gather_seconds(self) -> float:
        """How long recipients of the same cargo are waited for, so that they are delivered to together. 0: each is
        delivered to at once, by itself.
        """
        ...

    def deliver(self, cargo: Cargo, recipients: Sequence[Recipient]) -> AsyncIterator[Delivered]:
        """Says of each recipient once how it went, as soon as that is known. Closing the iterator ends what is
        still under way.
        """
        ...


class DirectDelivery:
    """A stream from here to each replica."""

    gather_seconds = 0.0

    async def deliver(self, cargo: Cargo, recipients: Sequence[Recipient]) -> AsyncIterator[Delivered]:
        """As in `Delivery`."""
        tasks = [asyncio.create_task(send(cargo, recipient)) for recipient in recipients]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def send(cargo: Cargo, recipient: Recipient) -> Delivered:
    """Sends all chunks as one stream."""
    try:
        sent = await cargo.push(recipient.port, recipient.push_id)
    except SteersmanError as error:
        return Delivered(target=recipient.target, error=error)
    return Delivered(target=recipient.target, sent_bytes=sent.num_bytes)
