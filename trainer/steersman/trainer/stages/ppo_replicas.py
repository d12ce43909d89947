"""The policy replicas of a run, as discovery shows them, for those who push weights and those who send prompts.

Invariants:

- The publisher knows a replica before the rollouts do: what gets prompts can get weights.
- A replica is sent prompts only after its model was found fit for the job and serves the wanted weights.
- If discovery ends by an error, the next batch raises it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from steersman.trainer.discovery.ports import Discovery, Targets
from steersman.trainer.retry import Backoff, GaveUp, Waits, retry
from steersman.trainer.weights.publisher import Publisher
from steersman.wire.errors import SteersmanError

_log = logging.getLogger(__name__)


class PolicyReplicas:
    """Keeps publisher and rollouts in step with discovery, and is the rollouts' `VersionGate`. Lives on one event loop.

    Args:
        check: raises ValueError if the model at a target does not suit the job, SteersmanError if it does not answer.
    """

    def __init__(
        self,
        discovery: Discovery,
        publisher: Publisher,
        check: Callable[[str], Awaitable[None]],
        *,
        backoff: Backoff,
        waits: Waits,
    ) -> None:
        self._discovery = discovery
        self._publisher = publisher
        self._check = check
        self._backoff = backoff
        self._waits = waits
        self._targets: Targets = ()
        self._fit: set[str] = set()
        self._some = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @property
    def targets(self) -> Targets:
        """What discovery found last."""
        return self._targets

    def follow(self, update: Callable[[Targets], None]) -> None:
        """Starts to follow discovery; `update` gets every change after the publisher has it."""
        self._following = asyncio.get_running_loop().create_task(self._follow(update))

    async def any_fit(self) -> None:
        """Returns once the model of a replica was found fit for the job; the others are looked at before their first
        prompt.

        Raises ValueError if a model that answers is not, DiscoveryRefused if there is no use in waiting for replicas,
        GaveUp after `give_up_seconds`.
        """
        what = f"policy at {self._discovery.name}"
        await retry(self._look_at_all, what=what, backoff=self._backoff, waits=self._waits)

    def require_following(self) -> None:
        """Raises what ended the discovery, if something did. A list that never changes ends in peace."""
        if self._following is not None and self._following.done():
            self._following.result()

    def explain_absence(self) -> str:
        """Where replicas are looked for, and why none is there if that is known."""
        return self._discovery.problem or self._discovery.name

    async def ensure_current(self, target: str) -> None:
        """See `VersionGate`. ValueError if the model there does not suit the job."""
        await self._require_fit(target)
        await self._publisher.ensure_current(target)

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        """See `VersionGate`."""
        return self._publisher.accepts(run_id, step, oldest_step=oldest_step)

    async def close(self) -> None:
        """Ends the discovery."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def _look_at_all(self) -> None:
        targets = await self._found()
        looks = await asyncio.gather(*(self._require_fit(target) for target in targets), return_exceptions=True)
        errors = [look for look in looks if isinstance(look, BaseException)]
        for error in errors:
            if len(errors) == len(looks) or not isinstance(error, SteersmanError):
                raise error

    async def _require_fit(self, target: str) -> None:
        if target not in self._fit:
            await self._check(target)
            self._fit.add(target)

    async def _found(self) -> Targets:
        """The replicas, once there is one."""
        assert self._following is not None, "follow first"
        give_up_seconds = self._backoff.give_up_seconds
        end = self._waits.clock() + give_up_seconds
        while not self._targets:
            self.require_following()
            if (seconds := end - self._waits.clock()) <= 0:
                raise GaveUp(f"no policy replica appeared for {give_up_seconds:.0f} s: {self.explain_absence()}")
            some = asyncio.create_task(self._some.wait())
            try:
                with self._waits.waiting("a policy replica to appear"):
                    await asyncio.wait({some, self._following}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            finally:
                some.cancel()
        return self._targets

    async def _follow(self, update: Callable[[Targets], None]) -> None:
        async with aclosing(self._discovery.targets()) as answers:
            async for targets in answers:
                come, gone = sorted(set(targets) - set(self._targets)), sorted(set(self._targets) - set(targets))
                _log.info("policy replicas: %d now; new: %s; gone: %s", len(targets), come or "none", gone or "none")
                # What comes back under an old address may be another model.
                self._fit.intersection_update(targets)
                await self._publisher.update_targets(targets)
                update(targets)
                self._targets = targets
                if targets:
                    self._some.set()
                else:
                    self._some.clear()
