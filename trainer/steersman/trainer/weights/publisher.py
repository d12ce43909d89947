"""Drives every policy replica to the wanted weights.

Invariants:

- The wanted version only moves forward, and a version names one set of weights for ever. A trainer that
  resumes from step k makes step k + 1 again, with other weights: so the run id that travels holds the number
  of the attempt ("demo.2"), which is counted up on disk before the first push (see `attempt`).
- A replica that fails or is slow does not hold up the others beyond the deadline: it stays behind, and
  `ensure_current` repairs it before it gets prompts.
- Replicas are known by their targets and may come and go at any time.
- At most three images are held: the one being published, the wanted one before it, and one older one that slow replicas
  are still receiving (the oldest, so that none starves).
- The event loop never waits for conversion, encoding or hashing: threads do that.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Final

from steersman.trainer.retry import Backoff, Sleep, Waits
from steersman.trainer.weights.delivery import Delivery, DirectDelivery
from steersman.trainer.weights.encode import Tally
from steersman.trainer.weights.history import DeltaHistory
from steersman.trainer.weights.image import Image
from steersman.trainer.weights.ports import Connect, LeaveOut
from steersman.trainer.weights.publication import Publication
from steersman.trainer.weights.replica import Progress, Replica
from steersman.trainer.weights.report import PublishReport
from steersman.trainer.weights.rounds import Rounds
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.wire.errors import SteersmanError, unavailable
from steersman.wire.identity import WeightVersion

# A trainer that is killed between two calls holds a replica for so long; between chunks pass milliseconds.
_LEASE_SECONDS: Final = 20.0
# Longest that a replica grants.
_MAX_LEASE_SECONDS: Final = 3600.0


class Publisher:
    """Publishes weights under `run_id` to replicas that may change. Lives on one event loop; `close` it.

    Args:
        connect: makes the port of a target; the publisher closes it.
        run_id: of this attempt; unique for every start of a trainer.
        targets: the first replicas; see `update_targets`.
        settings: when replicas switch, and how long they are waited for.
        delivery: how chunks get to replicas whose pushes are open.
        leave_out: whether a publication goes on without a replica that refuses for good; who says so takes it off the
            targets.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        run_id: str,
        targets: Iterable[str] = (),
        settings: PublishSettings | None = None,
        backoff: Backoff | None = None,
        waits: Waits | None = None,
        delivery: Delivery | None = None,
        leave_out: LeaveOut = lambda target, error: False,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.run_id = run_id
        self._connect = connect
        self._settings = settings or PublishSettings()
        self._backoff = backoff or Backoff()
        self._waits = waits or Waits()
        self._sleep = sleep
        self._leave_out = leave_out
        self._history = DeltaHistory(self._settings.encoding, max_bytes=self._settings.delta_history_bytes)
        self._rounds = Rounds(delivery or DirectDelivery())
        self._replicas: dict[str, Replica] = {}
        self._image: Image | None = None
        self._publishing = asyncio.Lock()
        self._publications: list[Publication] = []
        self._add(targets)

    async def close(self) -> None:
        """Ends what is under way and closes the ports."""
        for publication in self._publications:
            publication.cancel()
        self._history.close()
        await self.update_targets(())

    @property
    def targets(self) -> tuple[str, ...]:
        """The replicas, in the order in which they came."""
        return tuple(self._replicas)

    async def update_targets(self, targets: Iterable[str]) -> None:
        """Makes `targets` the replicas. New ones get the weights by `ensure_current` or the next publication; what is
        under way at those that are gone ends, and their ports are closed.
        """
        wanted = dict.fromkeys(targets)
        gone = [self._replicas.pop(target) for target in self.targets if target not in wanted]
        self._add(wanted)
        for publication in self._publications:
            for replica in gone:
                publication.remove(replica.target)
        await asyncio.gather(*(replica.close() for replica in gone))

    @property
    def wanted(self) -> WeightVersion | None:
        """The version that every replica should serve; None before the first publication."""
        return self._image.version if self._image is not None else None

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        """True if these weights are of this attempt, were published, and are of `oldest_step` or later."""
        wanted = self.wanted
        return wanted is not None and run_id == wanted.run_id and oldest_step <= step <= wanted.step

    async def publish(self, image: Image) -> PublishReport:
        """Brings `image` to all replicas at once and makes it the wanted weights: at once, or with ALL_OR_NOTHING when
        the quorum has staged it.

        A replica that cannot be reached, breaks off or takes too long is in the report. QuorumNotStaged if the
        version was given up; the wanted one stays what it was. WeightsRefused if a replica refuses for good, unless
        it is left out.
        ValueError if the version is not of this attempt or not newer than the wanted one.
        """
        if image.version.run_id != self.run_id or (self.wanted is not None and image.version <= self.wanted):
            raise ValueError(f"version is {image.version}, must be of run {self.run_id} and after {self.wanted}")
        async with self._publishing:
            started = time.monotonic()
            self._supersede()
            if self._image is not None:
                await self._history.extend(self._image, image)
            replicas = list(self._replicas.values())
            for replica in replicas:
                replica.progress = Progress()
            publication = Publication(
                image,
                replicas,
                self._settings,
                self._rounds,
                backoff=self._backoff,
                waits=self._waits,
                sleep=self._sleep,
                leave_out=self._leave_out,
            )
            self._publications.append(publication)
            try:
                await publication.run(lambda: self._commit(image))
            finally:
                self._forget_publications()
        total = Tally()
        for replica in replicas:
            total.add(replica.progress.tally)
        return PublishReport(
            seconds=time.monotonic() - started,
            delta_share=total.delta_share,
            pushed_bytes=sum(replica.progress.pushed_bytes for replica in replicas),
            pause_seconds=max((replica.progress.pause_seconds for replica in replicas), default=0.0),
            activation_skew_seconds=publication.skew_seconds,
            failures=publication.failures,
        )

    async def ensure_current(self, target: str) -> None:
        """Returns once the replica at `target` serves the wanted weights, pushing them if it does not.

        Raises the SteersmanError of a try that failed or of a target that is none of the replicas, WeightsRefused
        if there is no use in another try.
        """
        while True:
            if (image := self._image) is None:
                raise RuntimeError("nothing was published yet: publish the first weights before asking for rollouts")
            replica = self._replicas.get(target)
            if replica is None:
                raise unavailable(f"{target} is not one of the replicas")
            async with replica.transaction(image):
                # Another may have been published while this one waited for its turn.
                if image is self._image:
                    staged = await replica.stage(image)
                    if not staged.is_active:
                        await replica.activate(image.version, staged.digest)
            if image is self._image:
                return

    async def reconcile(self) -> PublishReport:
        """Brings every replica to the wanted weights once more; the report names those that stayed behind."""
        started = time.monotonic()
        targets = self.targets
        results = await asyncio.gather(*(self.ensure_current(target) for target in targets), return_exceptions=True)
        failures: dict[str, str] = {}
        for target, result in zip(targets, results, strict=True):
            if isinstance(result, SteersmanError):
                failures[target] = str(result)
            elif isinstance(result, BaseException):
                raise result
        return PublishReport(seconds=time.monotonic() - started, failures=failures)

    def _commit(self, image: Image) -> None:
        self._image = image

    def _forget_publications(self) -> None:
        """Those that are done: each holds its weights."""
        self._publications = [one for one in self._publications if not one.is_done]

    def _supersede(self) -> None:
        """Lets what is under way for older versions end, as far as memory allows."""
        self._forget_publications()
        for publication in self._publications:
            publication.supersede()
        old = [one for one in self._replicas.values() if one.image is not None and one.image is not self._image]
        oldest = min((one.image.version for one in old if one.image is not None), default=None)
        for replica in old:
            if replica.image is not None and replica.image.version != oldest:
                replica.stop()

    def _add(self, targets: Iterable[str]) -> None:
        settings = self._settings
        lease_seconds = _LEASE_SECONDS
        if settings.activation is ActivationMode.ALL_OR_NOTHING:
            # What is staged waits for the others.
            lease_seconds = min(_LEASE_SECONDS + settings.stage_timeout_seconds, _MAX_LEASE_SECONDS)
        for target in targets:
            if target not in self._replicas:
                self._replicas[target] = Replica(
                    self._connect(target),
                    self._rounds.send,
                    self._history,
                    kv_cache=settings.kv_cache,
                    lease_seconds=lease_seconds,
                )
