"""Drives every policy replica to the wanted weights.

Invariants:

- The wanted version only moves forward, and a version names one set of weights for ever. A trainer that
  resumes from step k makes step k + 1 again, with other weights: so the run id that travels holds the number
  of the attempt ("demo.2"), which is counted up on disk before the first push (see `attempt`).
- At most one push of ours is under way at a replica.
- A replica that fails does not hold up the others: it stays behind, and `ensure_current` repairs it before it
  gets prompts.
- Replicas are known by their targets and may come and go at any time.
- The event loop never waits for conversion, encoding or hashing: threads do that.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from steersman.client.types import KvCachePolicy
from steersman.trainer.retry import Backoff, Sleep, Waits
from steersman.trainer.weights.delivery import Cargo, Delivered, Delivery, DirectDelivery, Recipient
from steersman.trainer.weights.encode import PushEncoding, Tally
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.ports import FINAL_REFUSALS, Connect, WeightsRefused
from steersman.trainer.weights.replica import Progress, Replica, Wanted
from steersman.trainer.weights.report import PublishReport
from steersman.wire.errors import SteersmanError, unavailable
from steersman.wire.identity import WeightVersion

_log = logging.getLogger(__name__)

# Encoders release the interpreter; more would take cores from the trainer for a link that is busy already.
_ENCODER_THREADS: Final = 2


class Publisher:
    """Publishes weights under `run_id` to replicas that may change. Lives on one event loop; `close` it.

    Args:
        connect: makes the port of a target; the publisher closes it.
        run_id: of this attempt; unique for every start of a trainer.
        targets: the first replicas; see `update_targets`.
        push_attempts: tries of one push within `publish`.
        encoding: how weights travel to replicas that serve the version before; but for DENSE that is kept, one more
            copy of the weights on the host.
        delivery: how chunks get to replicas whose pushes are open.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        run_id: str,
        targets: Iterable[str] = (),
        push_attempts: int = 3,
        backoff: Backoff | None = None,
        waits: Waits | None = None,
        kv_cache: KvCachePolicy = KvCachePolicy.SERVER_DEFAULT,
        encoding: PushEncoding = PushEncoding.AUTO,
        delivery: Delivery | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.run_id = run_id
        self._connect = connect
        self._push_attempts = push_attempts
        self._backoff = backoff or Backoff()
        self._waits = waits or Waits()
        self._kv_cache = kv_cache
        self._sleep = sleep
        self._encoding = encoding
        self._delivery = delivery or DirectDelivery()
        self._threads = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="steersman-encoder")
        self._replicas: dict[str, Replica] = {}
        self._image: WeightImage | None = None
        self._base: WeightImage | None = None
        self._add(targets)

    async def close(self) -> None:
        """Ends the encoder's threads and closes the ports. Pushes under way fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self.update_targets(())

    @property
    def targets(self) -> tuple[str, ...]:
        """The replicas, in the order in which they came."""
        return tuple(self._replicas)

    async def update_targets(self, targets: Iterable[str]) -> None:
        """Makes `targets` the replicas. New ones get the weights by `ensure_current` or the next publication; the
        ports of those that are gone are closed, which ends what is under way there.
        """
        wanted = dict.fromkeys(targets)
        gone = [self._replicas.pop(target) for target in self.targets if target not in wanted]
        self._add(wanted)
        await asyncio.gather(*(replica.port.close() for replica in gone))

    @property
    def wanted(self) -> WeightVersion | None:
        """The version that every replica should serve; None before the first publication."""
        return self._image.version if self._image is not None else None

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        """True if these weights are of this attempt, were published, and are of `oldest_step` or later."""
        wanted = self.wanted
        return wanted is not None and run_id == wanted.run_id and oldest_step <= step <= wanted.step

    async def publish(self, image: WeightImage) -> PublishReport:
        """Makes `image` the wanted weights and pushes it to all replicas at once.

        A replica that cannot be reached or breaks off is in the report; WeightsRefused if one refuses for
        good. ValueError if the version is not of this attempt or not newer than the wanted one.
        """
        if image.version.run_id != self.run_id or (self.wanted is not None and image.version <= self.wanted):
            raise ValueError(f"version is {image.version}, must be of run {self.run_id} and after {self.wanted}")
        started = time.monotonic()
        self._base = self._image if self._encoding is not PushEncoding.DENSE else None
        self._image = image
        replicas = list(self._replicas.values())
        for replica in replicas:
            replica.progress = Progress()
        failures = await self._failures({replica.target: self._push_patiently(replica) for replica in replicas})
        for target, error in failures.items():
            _log.warning("weights %s did not reach %s yet: %s", image.version, target, error)
        total = Tally()
        for replica in replicas:
            total.add(replica.progress.tally)
        return PublishReport(
            seconds=time.monotonic() - started,
            delta_share=total.delta_share,
            pushed_bytes=sum(replica.progress.pushed_bytes for replica in replicas),
            pause_seconds=max((replica.progress.pause_seconds for replica in replicas), default=0.0),
            failures=failures,
        )

    async def ensure_current(self, target: str) -> None:
        """Returns once the replica at `target` serves the wanted weights, pushing them if it does not.

        Raises the SteersmanError of a try that failed or of a target that is none of the replicas, WeightsRefused
        if there is no use in another try.
        """
        replica = self._replicas.get(target)
        if replica is None:
            raise unavailable(f"{target} is not one of the replicas")
        await self._bring(replica)

    async def reconcile(self) -> PublishReport:
        """Brings every replica to the wanted weights once more; the report names those that stayed behind."""
        started = time.monotonic()
        failures = await self._failures({target: self._bring(one) for target, one in self._replicas.items()})
        return PublishReport(seconds=time.monotonic() - started, failures=failures)

    def _add(self, targets: Iterable[str]) -> None:
        for target in targets:
            if target not in self._replicas:
                self._replicas[target] = Replica(self._connect(target), self._send, kv_cache=self._kv_cache)

    async def _failures(self, work: dict[str, Awaitable[None]]) -> dict[str, str]:
        results = await asyncio.gather(*work.values(), return_exceptions=True)
        failures: dict[str, str] = {}
        for target, result in zip(work, results, strict=True):
            if isinstance(result, SteersmanError):
                failures[target] = str(result)
            elif isinstance(result, BaseException):
                raise result
        return failures

    async def _push_patiently(self, replica: Replica) -> None:
        for attempt in range(self._push_attempts):
            try:
                return await self._bring(replica)
            except SteersmanError as error:
                if attempt + 1 == self._push_attempts:
                    raise
                with self._waits.waiting(f"weights to {replica.target}"):
                    await self._sleep(max(self._backoff.delay(attempt), error.retry_after_seconds or 0.0))
        return None

    async def _bring(self, replica: Replica) -> None:
        """One look at the replica, and one push if it needs one."""
        async with replica.lock:
            if (image := self._image) is None:
                raise RuntimeError("nothing was published yet: publish the first weights before asking for rollouts")
            wanted = Wanted(image=image, base=self._base, encoding=self._encoding, threads=self._threads)
            try:
                digest = await replica.stage(wanted)
                if digest is not None:
                    await replica.activate(image, digest)
            except SteersmanError as error:
                if error.reason in FINAL_REFUSALS:
                    raise WeightsRefused(f"{replica.target} refuses {image.version}: {error}") from error
                raise

    async def _send(self, cargo: Cargo, recipient: Recipient) -> Delivered:
        delivered = [one async for one in self._delivery.deliver(cargo, [recipient])]
        assert len(delivered) == 1
        return delivered[0]
