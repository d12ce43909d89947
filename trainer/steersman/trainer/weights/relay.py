"""A delivery in which replicas pass the chunks on to each other, so that they leave this process once.

Invariants:

- every recipient is told of once; what it holds is proven by its digest when it is staged, as with any delivery;
- a replica is told to have everything only if it has received as many bytes and chunks as were sent;
- what goes wrong on a route is tried again on another one, and in the end from here to each: an error that is reported
  is the replica's own, and no fault of those before it;
- a first replica that stands still ends its route after a bounded time, as a later one does (see the relay of the
  policy service).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from steersman.client.types import PushReceipt, RelayHop, RelayReceipt
from steersman.trainer.weights.cargo import Cargo, dense_bytes
from steersman.trainer.weights.delivery import Delivered, Recipient, send
from steersman.trainer.weights.routes import Node, Topology, plan
from steersman.wire.errors import Reason, SteersmanError, unavailable

_log = logging.getLogger(__name__)

# On a route, on a route around what broke, from here to each.
_MAX_ROUNDS: Final = 3
# Deliveries in which the ends of a link that broke pass nothing on.
_PROBATION: Final = 8
# For a call that a replica which is alive answers at once: one that stands still must not hold up those behind it.
_REOPEN_SECONDS: Final = 5.0
_PATIENCE_PER_LEVEL_S: Final = 0.15
"""As at the replicas: those nearer to what stands still give it up first."""
# Of the dense weights; for the choice of a topology, before a delta is encoded.
_DELTA_SHARE: Final = 0.05

Route = Node[Recipient]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How it went at some, and who is to be tried again."""

    delivered: list[Delivered]
    pending: list[Recipient]


@dataclass(frozen=True, kw_only=True)
class RelaySettings:
    """How chunks get to several replicas.

    Attributes:
        topology: how they hand them on.
        fan_out: streams out of each replica of a tree, 2 to 16.
        gather_seconds: how long replicas that are to have the same wait for each other.
        stall_seconds: how long the first replica of a route may take no chunk; more if others hang on it. Above the
            `relay_stall_seconds` of the replicas, or it is given up for the fault of one behind it.
    """

    topology: Topology = Topology.AUTO
    fan_out: int = 2
    gather_seconds: float = 1.0
    stall_seconds: float = 15.0

    def __post_init__(self) -> None:
        if not 2 <= self.fan_out <= 16:
            raise ValueError(f"fan_out is {self.fan_out}, allowed: 2 to 16")


class RelayDelivery:
    """Delivers along routes. Remembers which links broke. Lives on one event loop."""

    def __init__(self, settings: RelaySettings | None = None) -> None:
        self._settings = settings or RelaySettings()
        self._probation: dict[str, int] = {}
        self._sent_to_directly: set[str] = set()

    @property
    def gather_seconds(self) -> float:
        """As in `Delivery`."""
        return 0.0 if self._settings.topology is Topology.DIRECT else self._settings.gather_seconds

    async def deliver(self, cargo: Cargo, recipients: Sequence[Recipient]) -> AsyncIterator[Delivered]:
        """As in `Delivery`."""
        under_way: dict[asyncio.Task[_Outcome], int] = {}

        def start(pending: Sequence[Recipient], number: int) -> None:
            is_last = number == _MAX_ROUNDS - 1
            for route in [Node(item=one) for one in pending] if is_last else self._plan(cargo, pending):
                under_way[asyncio.create_task(self._try(cargo, route))] = number

        start(recipients, 0)
        try:
            while under_way:
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number, outcome = under_way.pop(task), task.result()
                    start(outcome.pending, number + 1)  # at once: other routes may take their time
                    for one in outcome.delivered:
                        yield one
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        self._forgive()

    async def _try(self, cargo: Cargo, route: Route) -> "_Outcome":
        """What came of one route; those that are to be tried otherwise have a new push."""
        delivered, failed = await self._along(cargo, route)
        seconds = min(_REOPEN_SECONDS, self._settings.stall_seconds)
        pending: list[Recipient] = []
        for again in await asyncio.gather(*(_reopen(one, seconds) for one in failed)):
            if isinstance(again, Delivered):
                delivered.append(again)
            else:
                pending.append(again)
        return _Outcome(delivered=delivered, pending=pending)

    def _plan(self, cargo: Cargo, recipients: Sequence[Recipient]) -> list[Route]:
        """Routes over all of them; those on probation pass nothing on, or are sent to from here. In the order of their
        targets: the same every time, and neighbours by address are neighbours on the route.
        """
        settings = self._settings
        recipients = sorted(recipients, key=lambda one: one.target)
        relays = [one for one in recipients if one.target not in self._probation]
        leaves = [one for one in recipients if one.target in self._probation]
        direct = [one for one in leaves if one.target in self._sent_to_directly]
        leaves = [one for one in leaves if one.target not in self._sent_to_directly]
        nbytes = dense_bytes(cargo.manifest)
        if cargo.base_version is not None:
            nbytes = int(_DELTA_SHARE * nbytes)
        routes = plan(relays, leaves, settings.topology, fan_out=settings.fan_out, nbytes=nbytes)
        return routes + [Node(item=one) for one in direct]

    async def _along(self, cargo: Cargo, route: Route) -> tuple[list[Delivered], list[Recipient]]:
        """Those that have all chunks or have failed for good, and those that are to be tried otherwise."""
        if not route.next:
            return [await send(cargo, route.item)], []
        first = route.item
        hops = tuple(_hop(node) for node in route.next)
        patience = self._settings.stall_seconds + _PATIENCE_PER_LEVEL_S * route.height
        try:
            sent = await cargo.push(first.port, first.push_id, relay=hops, patience_seconds=patience)
        except SteersmanError as error:
            self._blame(None, route, error)
            return [], [node.item for node in route.walk()]
        delivered = [Delivered(target=first.target, sent_bytes=sent.num_bytes)]
        receipts = {one.target: one for one in sent.receipt.relayed}
        failed = self._sort_out(route, sent.receipt, receipts, delivered)
        return delivered, failed

    def _sort_out(
        self, node: Route, sent: PushReceipt, receipts: dict[str, RelayReceipt], delivered: list[Delivered]
    ) -> list[Recipient]:
        """Goes through those behind a replica that has everything: adds to `delivered`, returns the others."""
        failed: list[Recipient] = []
        for behind in node.next:
            error = _shortcoming(behind.item.target, sent, receipts)
            if error is None:
                delivered.append(Delivered(target=behind.item.target))
                failed += self._sort_out(behind, sent, receipts, delivered)
            else:
                # Those behind a link that broke are not asked: whatever they have, nobody vouches for it.
                self._blame(node, behind, error)
                failed += [one.item for one in behind.walk()]
        return failed

    def _blame(self, before: Route | None, node: Route, error: SteersmanError) -> None:
        """Remembers the ends of a link that broke; the far one is sent to from here for a while."""
        by = f"behind {before.item.target}" if before is not None else "with others behind it"
        _log.warning("%s was not reached %s, a way round is tried: %s", node.item.target, by, error)
        if before is not None:
            self._probation[before.item.target] = _PROBATION
            if error.reason is Reason.UNIMPLEMENTED:
                return  # the fault is not at the far end
        self._probation[node.item.target] = _PROBATION
        self._sent_to_directly.add(node.item.target)

    def _forgive(self) -> None:
        """One delivery less for everybody on probation."""
        self._probation = {target: left - 1 for target, left in self._probation.items() if left > 1}
        self._sent_to_directly &= self._probation.keys()


def _hop(node: Route) -> RelayHop:
    return RelayHop(target=node.item.target, push_id=node.item.push_id, next=tuple(_hop(one) for one in node.next))


def _shortcoming(target: str, sent: PushReceipt, receipts: dict[str, RelayReceipt]) -> SteersmanError | None:
    """Why a replica does not have what the first one has; None if it does."""
    receipt = receipts.get(target)
    if receipt is None:
        return SteersmanError(Reason.UNIMPLEMENTED, "nothing was passed on: a replica before it knows no relay")
    if receipt.error is not None:
        return receipt.error
    if (receipt.received_bytes, receipt.num_chunks) != (sent.received_bytes, sent.num_chunks):
        return unavailable(f"{receipt.received_bytes} of {sent.received_bytes} bytes came through")
    return None


async def _reopen(recipient: Recipient, seconds: float) -> Recipient | Delivered:
    """The recipient with a new push, as the old one ended with its stream; what went wrong if it refuses, or does not
    answer within so many seconds.
    """
    try:
        async with asyncio.timeout(seconds):
            return replace(recipient, push_id=await recipient.reopen())
    except SteersmanError as refusal:
        error = refusal
    except TimeoutError:
        error = SteersmanError(
            Reason.DEADLINE_EXCEEDED, f"{recipient.target} did not begin a push within {seconds:g} s"
        )
    return Delivered(target=recipient.target, error=error)
