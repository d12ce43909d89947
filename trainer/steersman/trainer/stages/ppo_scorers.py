"""Reference and reward behind an address that may show other endpoints in mid-run.

gRPC balances the calls, over the endpoints of a list or over the addresses of a name, which it looks up by itself. It
does not know EndpointSlices: those are followed here, and each new set of endpoints gets a client of its own.

Invariants:

- A call goes to endpoints that were shown last when it began. It may end at one that is gone from the list meanwhile;
  what does not end fails, and is sent again by whoever asked.
- A client is closed when it is no longer the last and nothing is under way at it.
- While there are no endpoints calls fail with UNAVAILABLE and the reason, which callers wait out.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from steersman.client import AsyncReferenceClient, AsyncRewardClient
from steersman.trainer.discovery.ports import Discovery
from steersman.trainer.discovery.union import discover
from steersman.trainer.rollout.adapters import GrpcReference, GrpcReward
from steersman.trainer.rollout.types import Completion, FloatArray
from steersman.wire.errors import SteersmanError, unavailable

_log = logging.getLogger(__name__)


class Closable(Protocol):
    """A client."""

    async def close(self) -> None:
        """Ends its connections."""
        ...


ClientT = TypeVar("ClientT", bound=Closable)


@dataclass(kw_only=True)
class _Held(Generic[ClientT]):
    client: ClientT
    num_calls: int = 0


class FollowedClient(Generic[ClientT]):
    """The client of all endpoints at `address`. Lives on one event loop; `close` it.

    Args:
        connect: makes a client of a target as gRPC clients take it, `a:1,b:2` for several.
        default_port: see `discover`.
    """

    def __init__(self, address: str, connect: Callable[[str], ClientT], *, default_port: int) -> None:
        self.target = address
        self._connect = connect
        self._now: _Held[ClientT] | None = None
        self._old: list[_Held[ClientT]] = []
        self._discovery: Discovery | None = None
        self._following: asyncio.Task[None] | None = None
        if address.startswith("k8s:"):
            self._discovery = discover([address], default_port=default_port)
            self._following = asyncio.get_running_loop().create_task(self._follow(self._discovery))
        else:
            self._now = _Held(client=connect(address))

    @property
    def problem(self) -> str:
        """Why the last look for endpoints failed, or found none; empty if it did not."""
        return self._discovery.problem if self._discovery is not None else ""

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[ClientT]:
        """A client for one call. SteersmanError UNAVAILABLE while there are no endpoints, DiscoveryRefused if there is
        no use in waiting for them.
        """
        if self._following is not None and self._following.done():
            self._following.result()
        if (held := self._now) is None:
            raise unavailable(f"no endpoint of {self.target}: {self.problem or 'none is known yet'}")
        held.num_calls += 1
        try:
            yield held.client
        finally:
            held.num_calls -= 1
            await self._close_idle()

    async def close(self) -> None:
        """Ends discovery and closes the clients: calls under way fail."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        held, self._now, self._old = [*self._old, *([self._now] if self._now else [])], None, []
        await asyncio.gather(*(one.client.close() for one in held))

    async def _follow(self, discovery: Discovery) -> None:
        async with aclosing(discovery.targets()) as answers:
            async for targets in answers:
                _log.info("%s: %d endpoints now: %s", self.target, len(targets), ", ".join(targets) or "none")
                if self._now is not None:
                    self._old.append(self._now)
                self._now = _Held(client=self._connect(",".join(targets))) if targets else None
                await self._close_idle()

    async def _close_idle(self) -> None:
        idle = [one for one in self._old if not one.num_calls]
        self._old = [one for one in self._old if one.num_calls]
        await asyncio.gather(*(one.client.close() for one in idle))


@dataclass(frozen=True, kw_only=True)
class FollowedReward:
    """A `RewardPort` of endpoints that may change. `port` says how a client is asked."""

    followed: FollowedClient[AsyncRewardClient]
    port: Callable[[AsyncRewardClient], GrpcReward]

    @property
    def target(self) -> str:
        """The address in the settings."""
        return self.followed.target

    async def scores(self, completions: Sequence[Completion]) -> Sequence[float | SteersmanError]:
        """See `RewardPort`."""
        async with self.followed.lease() as client:
            return await self.port(client).scores(completions)


@dataclass(frozen=True, kw_only=True)
class FollowedReference:
    """A `ReferencePort` of endpoints that may change."""

    followed: FollowedClient[AsyncReferenceClient]

    @property
    def target(self) -> str:
        """The address in the settings."""
        return self.followed.target

    async def logprobs(
        self, completions: Sequence[Completion], temperature: float
    ) -> Sequence[FloatArray | SteersmanError]:
        """See `ReferencePort`."""
        async with self.followed.lease() as client:
            return await GrpcReference(client=client).logprobs(completions, temperature)
