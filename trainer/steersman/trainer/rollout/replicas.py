"""Which policy replica gets the next prompt.

Invariants:

- A replica gets prompts only after `VersionGate.ensure_current` returned for it and it answers, and not again after
  a failure until both are so anew: what is new, or comes back from a restart, gets the current weights first.
- Among the replicas that may be used, the one with the fewest samples in flight gets the next prompt. A new batch waits
  a moment for the answers of all, or the one that answers first would get everything.
- A replica that is no longer among the targets gets no more prompts. What it has under way may end there; its
  port is closed after that.
- While no replica can be used callers wait, and every replica is tried again with backoff; after
  `give_up_seconds` without any, they get GaveUp.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from steersman.trainer.retry import Backoff, GaveUp, Sleep, Waits
from steersman.trainer.rollout.ports import Connect, PolicyPort, VersionGate
from steersman.wire.errors import SteersmanError

# Longer than a replica that is well takes to say so, shorter than a batch.
_GATHER_SECONDS: Final = 0.5


@dataclass(kw_only=True, eq=False)
class Replica:
    """One policy replica and what is known of it."""

    port: PolicyPort
    ready: bool = False
    num_in_flight: int = 0
    # Counts the times it was found good: a failure seen in an earlier life says nothing about the present
    # one.
    epoch: int = 0
    recovery: asyncio.Task[None] | None = None


class ReplicaPool:
    """Leases replicas, and brings failed ones back. Lives on one event loop; `close` ends its tasks and ports.

    Args:
        connect: makes the port of a target; the pool closes it.
        gate: see `VersionGate`.
        targets: the first replicas; see `update_targets`.
        max_in_flight: samples at one replica at once.
        explain_absence: why there are no targets, where there are none; may be empty.
    """

    def __init__(
        self,
        connect: Connect,
        gate: VersionGate,
        *,
        targets: Iterable[str] = (),
        backoff: Backoff,
        waits: Waits,
        max_in_flight: int = 256,
        explain_absence: Callable[[], str] = str,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._connect = connect
        self._gate = gate
        self._backoff = backoff
        self._waits = waits
        self._max_in_flight = max_in_flight
        self._explain_absence = explain_absence
        self._sleep = sleep
        self._changed = asyncio.Condition()
        self._replicas = {target: Replica(port=connect(target)) for target in dict.fromkeys(targets)}
        # Put to the gate for a new batch, and not heard of since.
        self._asked: set[Replica] = set()
        self._gathering: asyncio.TimerHandle | None = None
        # No longer among the targets, but with samples under way.
        self._draining: set[Replica] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._absence: asyncio.Task[None] | None = None
        # None while a replica is ready, and before anybody asked for one.
        self._none_ready_since: float | None = None
        self._in_use = False
        self._failure: Exception | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The replicas, in the order in which they came."""
        return tuple(self._replicas)

    def update_targets(self, targets: Iterable[str]) -> None:
        """Makes `targets` the replicas. New ones are put to the gate at once, if `check_all` was called before."""
        wanted = dict.fromkeys(targets)
        for target in [target for target in self._replicas if target not in wanted]:
            self._retire(self._replicas.pop(target))
        for target in wanted:
            if target not in self._replicas:
                replica = self._replicas[target] = Replica(port=self._connect(target))
                if self._in_use:
                    self._recover(replica)
        if self._replicas and self._absence is not None:
            self._absence.cancel()
            self._absence = None
        self._note_readiness()

    def check_all(self) -> None:
        """Puts every replica to the gate before its next prompt: one may have restarted while nobody looked."""
        if self._failure is not None:
            self._failure, self._none_ready_since = None, None
        self._in_use = True
        self._asked.update(replica for replica in self._replicas.values() if replica.recovery is None)
        if self._gathering is not None:
            self._gathering.cancel()
        self._gathering = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._end_gathering)
        for replica in self._replicas.values():
            self._recover(replica)
        self._note_readiness()

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
            if replica in self._draining and not replica.num_in_flight:
                self._end(replica)
            await self._notify()

    def failed(self, replica: Replica, epoch: int) -> bool:
        """Takes the replica out until the gate lets it in again. False, and nothing, if it is out, gone, or came
        back since `epoch`.
        """
        if replica.epoch != epoch or not replica.ready:
            return False
        self._recover(replica)
        self._note_readiness()
        return True

    async def close(self) -> None:
        """Ends the attempts to bring replicas back, and closes the ports: what is under way fails."""
        self._in_use = False
        self.update_targets(())
        for replica in list(self._draining):
            self._end(replica)
        if self._absence is not None:
            self._absence.cancel()
        if self._gathering is not None:
            self._gathering.cancel()
        await self._fail(GaveUp("the rollout was closed"))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end_gathering(self) -> None:
        if self._asked:
            self._asked.clear()
            self._start(self._notify())

    def _choose(self, num_samples: int) -> Replica | None:
        if self._asked:
            return None
        usable = [
            replica
            for replica in self._replicas.values()
            # An idle replica takes even a prompt with more samples than the limit: it would never fit
            # otherwise.
            if replica.ready
            and (not replica.num_in_flight or replica.num_in_flight + num_samples <= self._max_in_flight)
        ]
        return min(usable, key=lambda replica: replica.num_in_flight, default=None)

    def _retire(self, replica: Replica) -> None:
        replica.ready = False
        self._asked.discard(replica)
        if replica.recovery is not None:
            replica.recovery.cancel()
        if replica.num_in_flight:
            self._draining.add(replica)
        else:
            self._end(replica)

    def _end(self, replica: Replica) -> None:
        self._draining.discard(replica)
        self._start(replica.port.close())

    def _note_readiness(self) -> None:
        if any(replica.ready for replica in self._replicas.values()):
            self._none_ready_since = None
        elif self._in_use:
            if self._none_ready_since is None:
                self._none_ready_since = self._waits.clock()
            if not self._replicas and self._absence is None:
                self._absence = self._start(self._outlast_absence())

    def _seconds_without(self) -> float:
        return 0.0 if self._none_ready_since is None else self._waits.clock() - self._none_ready_since

    def _recover(self, replica: Replica) -> None:
        replica.ready = False
        if replica.recovery is None:
            replica.recovery = self._start(self._bring_back(replica))

    async def _bring_back(self, replica: Replica) -> None:
        failure: Exception | None = None
        try:
            await self._pass_gate(replica)
        except Exception as error:  # gave up, a defect, or a refusal for good: whoever waits must hear of it
            failure = error
        # First, so that a failure from here on starts the next recovery.
        replica.recovery = None
        self._asked.discard(replica)
        if failure is not None:
            await self._fail(failure)
            return
        replica.epoch += 1
        replica.ready = True
        self._note_readiness()
        await self._notify()

    async def _pass_gate(self, replica: Replica) -> None:
        started, attempt, what = self._waits.clock(), 0, f"policy at {replica.port.target}"
        while True:
            try:
                await self._gate.ensure_current(replica.port.target)
                return await replica.port.ready()
            except SteersmanError as error:
                if self._seconds_without() >= self._backoff.give_up_seconds:
                    away_seconds = self._waits.clock() - started
                    raise GaveUp(f"{what} stayed away for {away_seconds:.0f} s: {error}") from error
                delay = max(self._backoff.delay(attempt), error.retry_after_seconds or 0.0)
            if replica in self._asked:
                self._asked.discard(replica)
                await self._notify()
            with self._waits.waiting(what):
                await self._sleep(delay)
            attempt += 1

    async def _outlast_absence(self) -> None:
        attempt = 0
        while (seconds := self._seconds_without()) < self._backoff.give_up_seconds:
            with self._waits.waiting("a policy replica to appear"):
                await self._sleep(self._backoff.delay(attempt))
            attempt += 1
        self._absence = None
        why = self._explain_absence()
        await self._fail(GaveUp(f"no policy replica appeared for {seconds:.0f} s" + (f": {why}" if why else "")))

    async def _fail(self, error: Exception) -> None:
        self._failure = error
        await self._notify()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
