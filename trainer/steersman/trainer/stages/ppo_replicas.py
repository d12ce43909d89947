"""The policy replicas of a run, as discovery shows them, for those who push weights and those who send prompts.

Invariants:

- The publisher knows a replica before the rollouts do: what gets prompts can get weights.
- A replica is sent prompts only after its model was found fit for the job and serves the wanted weights.
- A replica that refuses for good (its model does not suit the job, or another job has taken it over) is left out while
  the others are enough: `min_share` of those that discovery shows, and at least one. Else it ends the job. It is looked
  at again when discovery has shown its address no more, and shows it anew.
- If discovery ends by an error, the next batch raises it.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from steersman.trainer.discovery.ports import Discovery, Targets
from steersman.trainer.retry import Backoff, GaveUp, Waits, retry
from steersman.trainer.weights.ports import LeaveOut, WeightsRefused
from steersman.trainer.weights.publisher import Publisher
from steersman.wire.errors import SteersmanError, unavailable

_log = logging.getLogger(__name__)


class PolicyReplicas:
    """Keeps publisher and rollouts in step with discovery, and is the rollouts' `VersionGate`. Lives on one event loop.

    Args:
        publish_to: makes the publisher, given who is to be asked about replicas that refuse for good.
        check: raises ValueError if the model at a target does not suit the job, SteersmanError if it does not answer.
        min_share: of the replicas must be left when one is left out.
    """

    def __init__(
        self,
        discovery: Discovery,
        publish_to: Callable[[LeaveOut], Publisher],
        check: Callable[[str], Awaitable[None]],
        *,
        min_share: float = 0.0,
        backoff: Backoff,
        waits: Waits,
    ) -> None:
        self._discovery = discovery
        self.publisher = publish_to(self._leave_out)
        self._min_share = min_share
        self._check = check
        self._backoff = backoff
        self._waits = waits
        self._discovered: Targets = ()
        self._targets: Targets = ()
        self._fit: set[str] = set()
        self._left_out: dict[str, str] = {}
        self._some = asyncio.Event()
        self._update: Callable[[Targets], None] = lambda targets: None
        self._telling = asyncio.Lock()
        self._tellings: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None

    @property
    def targets(self) -> Targets:
        """What discovery found last, less those that are left out."""
        return self._targets

    @property
    def left_out(self) -> dict[str, str]:
        """Why, for each replica that is left out."""
        return dict(self._left_out)

    def follow(self, update: Callable[[Targets], None]) -> None:
        """Starts to follow discovery; `update` gets every change after the publisher has it."""
        self._update = update
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def any_fit(self) -> None:
        """Returns once the model of a replica was found fit for the job; the others are looked at before their first
        prompt.

        Raises ValueError if a model that answers is not and cannot be left out, DiscoveryRefused if there is no use in
        waiting for replicas, GaveUp after `give_up_seconds`.
        """
        what = f"policy at {self._discovery.name}"
        await retry(self._look_at_all, what=what, backoff=self._backoff, waits=self._waits)

    def require_following(self) -> None:
        """Raises what ended the discovery, if something did. A list that never changes ends in peace."""
        if self._following is not None and self._following.done():
            self._following.result()

    def explain_absence(self) -> str:
        """Where replicas are looked for, and why none is there if that is known."""
        return self.problem or self._discovery.name

    @property
    def problem(self) -> str:
        """Why the last look at discovery failed, and which replicas are left out and why; empty if there is neither."""
        left_out = [f"left out is {target}: {why}" for target, why in sorted(self._left_out.items())]
        return "; ".join(filter(None, (self._discovery.problem, *left_out)))

    async def ensure_current(self, target: str) -> None:
        """See `VersionGate`. ValueError or WeightsRefused if the replica refuses for good and cannot be left out."""
        try:
            await self._require_fit(target)
            await self.publisher.ensure_current(target)
        except (ValueError, WeightsRefused) as error:
            if not self._leave_out(target, error):
                raise
            raise unavailable(f"{target} is left out: {error}") from error

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        """See `VersionGate`."""
        return self.publisher.accepts(run_id, step, oldest_step=oldest_step)

    async def close(self) -> None:
        """Ends the discovery."""
        tasks = [*self._tellings, *([self._following] if self._following is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _leave_out(self, target: str, error: Exception) -> bool:
        """Leaves out a replica that refuses for good. False, and nothing, if too few would be left."""
        if target not in self._discovered or target in self._left_out:
            return True  # gone meanwhile, or told twice
        num_left = len(self._in_use()) - 1
        if num_left < max(1, math.ceil(self._min_share * len(self._discovered) - 1e-9)):
            return False
        self._left_out[target] = str(error)
        _log.warning("policy at %s is left out, %d of %d go on: %s", target, num_left, len(self._discovered), error)
        telling = asyncio.get_running_loop().create_task(self._tell())
        self._tellings.add(telling)
        telling.add_done_callback(self._tellings.discard)
        return True

    def _in_use(self) -> Targets:
        return tuple(target for target in self._discovered if target not in self._left_out)

    async def _tell(self) -> None:
        """Tells publisher and rollouts who there is, in that order."""
        async with self._telling:
            targets = self._in_use()
            await self.publisher.update_targets(targets)
            self._update(targets)
            self._targets = targets
            if targets:
                self._some.set()
            else:
                self._some.clear()

    async def _look_at_all(self) -> None:
        targets = await self._found()
        looks = await asyncio.gather(*(self._require_fit(target) for target in targets), return_exceptions=True)
        errors = [look for look in looks if isinstance(look, BaseException)]
        for target, error in zip(targets, looks, strict=True):
            if isinstance(error, ValueError) and self._leave_out(target, error):
                continue
            if isinstance(error, BaseException) and (
                len(errors) == len(looks) or not isinstance(error, SteersmanError)
            ):
                raise error
        if len(errors) == len(looks):
            raise unavailable("no policy replica answers that suits the job")

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

    async def _follow(self) -> None:
        async with aclosing(self._discovery.targets()) as answers:
            async for targets in answers:
                come, gone = sorted(set(targets) - set(self._discovered)), sorted(set(self._discovered) - set(targets))
                _log.info("policy replicas: %d now; new: %s; gone: %s", len(targets), come or "none", gone or "none")
                # What comes back under an old address may be another model.
                self._fit.intersection_update(targets)
                self._left_out = {target: why for target, why in self._left_out.items() if target in targets}
                self._discovered = targets
                await self._tell()
