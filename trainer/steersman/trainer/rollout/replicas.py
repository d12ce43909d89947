"""Which policy replica gets the next prompt.

Invariants:

- A replica gets prompts only after `VersionGate.ensure_current` returned for it, and not again after a
  failure until it returned anew: what comes back from a restart gets the current weights first.
- Among the replicas that may be used, the one with the fewest samples in flight gets the next prompt.
- While no replica can be used callers wait, and every replica is tried again with backoff; after
  `give_up_seconds` without any, they get GaveUp.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from steersman.trainer.retry import Backoff, GaveUp, Sleep, Waits
from steersman.trainer.rollout.ports import PolicyPort, VersionGate
from steersman.wire.errors import SteersmanError


@dataclass(kw_only=True, eq=False)
class Replica:
    """One policy replica and what is known of it."""

    number: int
    port: PolicyPort
    ready: bool = False
    num_in_flight: int = 0
    # Counts the times it was found good: a failure seen in an earlier life says nothing about the present
    # one.
    epoch: int = 0


class ReplicaPool:
    """Leases replicas, and brings failed ones back. Lives on one event loop; `close` ends its tasks."""

    def __init__(
        self,
        ports: Sequence[PolicyPort],
        gate: VersionGate,
        *,
        backoff: Backoff,
        waits: Waits,
        max_in_flight: int = 256,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        if not ports:
            raise ValueError("policy targets are empty, at least one replica is needed")
        self._replicas = [Replica(number=number, port=port) for number, port in enumerate(ports)]
        self._gate = gate
        self._backoff = backoff
        self._waits = waits
        self._max_in_flight = max_in_flight
        self._sleep = sleep
        self._changed = asyncio.Condition()
        self._recoveries: dict[int, asyncio.Task[None]] = {}
        self._failure: Exception | None = None

    def check_all(self) -> None:
        """Puts every replica to the gate before its next prompt: one may have restarted while nobody looked."""
        self._failure = None
        for replica in self._replicas:
            self._recover(replica)

    @asynccontextmanager
    async def lease(self, num_samples: int) -> AsyncIterator[tuple[Replica, int]]:
        """The replica to use for a prompt of `num_samples`, and its epoch (for `failed`). Waits for one that
        is ready and has room.
        """
        async with self._changed:
            while (replica := self._choose(num_samples)) is None:
                if self._failure is not None:
                    raise GaveUp(str(self._failure)) from self._failure
                await self._changed.wait()
            replica.num_in_flight += num_samples
        try:
            yield replica, replica.epoch
        finally:
            replica.num_in_flight -= num_samples
            await self._notify()

    def failed(self, replica: Replica, epoch: int) -> bool:
        """Takes the replica out until the gate lets it in again. False, and nothing, if it is out or came back
        since `epoch`.
        """
        if replica.epoch != epoch or not replica.ready:
            return False
        self._recover(replica)
        return True

    async def close(self) -> None:
        """Ends the attempts to bring replicas back."""
        for task in self._recoveries.values():
            task.cancel()
        await asyncio.gather(*self._recoveries.values(), return_exceptions=True)

    def _choose(self, num_samples: int) -> Replica | None:
        usable = [
            replica
            for replica in self._replicas
            # An idle replica takes even a prompt with more samples than the limit: it would never fit
            # otherwise.
            if replica.ready
            and (not replica.num_in_flight or replica.num_in_flight + num_samples <= self._max_in_flight)
        ]
        return min(usable, key=lambda replica: replica.num_in_flight, default=None)

    def _recover(self, replica: Replica) -> None:
        replica.ready = False
        if replica.number not in self._recoveries:
            task = asyncio.get_running_loop().create_task(self._bring_back(replica))
            self._recoveries[replica.number] = task
            task.add_done_callback(lambda _: self._recoveries.pop(replica.number, None))

    async def _bring_back(self, replica: Replica) -> None:
        started, attempt, what = self._waits.clock(), 0, f"policy at {replica.port.target}"
        while True:
            try:
                await self._gate.ensure_current(replica.port.target)
            except SteersmanError as error:
                away_seconds = self._waits.clock() - started
                if away_seconds >= self._backoff.give_up_seconds and not any(r.ready for r in self._replicas):
                    self._failure = GaveUp(f"{what} stayed away for {away_seconds:.0f} s: {error}")
                    await self._notify()
                    return
                with self._waits.waiting(what):
                    await self._sleep(max(self._backoff.delay(attempt), error.retry_after_seconds or 0.0))
                attempt += 1
            except Exception as error:  # a defect or a refusal for good: whoever waits must hear of it
                self._failure = error
                await self._notify()
                return
            else:
                replica.epoch += 1
                replica.ready = True
                await self._notify()
                return

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
