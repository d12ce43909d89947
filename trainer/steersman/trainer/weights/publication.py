"""One version on its way to the replicas: staged everywhere, then activated.

Invariants:

- A replica activates only what it has staged and verified, and only after the decision for it.
- `as_staged`: the decision is made from the start. `all_or_nothing`: it is made for the version when the quorum has
  staged, and against it at the deadline, or as soon as the quorum is out of reach; until then nobody activates, and
  after a decision against it what is staged is given up everywhere.
- Once decided for, those that have staged activate at once, and later ones when they have.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from steersman.trainer.retry import Backoff, Sleep, Waits
from steersman.trainer.weights.image import Image
from steersman.trainer.weights.ports import LeaveOut, WeightsRefused
from steersman.trainer.weights.replica import Replica, Staged
from steersman.trainer.weights.rounds import Rounds
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.wire.errors import Code, SteersmanError

_log = logging.getLogger(__name__)

# An activation pauses the engine for some decode steps; a replica that needs longer is stuck.
_ACTIVATION_SECONDS: Final = 60.0


class QuorumNotStaged(SteersmanError):
    """Too few replicas have staged the version: none has activated it, and the wanted version stays what it was. The
    same weights may be published again, or later ones.
    """

    def __init__(self, message: str) -> None:
        super().__init__(None, message, code=Code.UNAVAILABLE)


@dataclass(kw_only=True)
class _Part:
    """One replica's part. `staged` and the times are None until it comes to that; clock of this process."""

    replica: Replica
    task: "asyncio.Task[None] | None" = None
    staged: Staged | None = None
    activation_began: float | None = None
    activation_ended: float | None = None


class Publication:
    """Brings `image` to `replicas`. Lives on one event loop; `run` is called once.

    Attributes:
        failures: why, by target, for replicas that stayed behind; complete when `run` has returned.
        skew_seconds: no two replicas activated further apart, by the clock of this process: from the first request to
            the last answer. With ALL_OR_NOTHING those count that had staged when it was decided. 0 for fewer than two.
    """

    def __init__(
        self,
        image: Image,
        replicas: Sequence[Replica],
        settings: PublishSettings,
        rounds: Rounds,
        *,
        backoff: Backoff,
        waits: Waits,
        sleep: Sleep,
        leave_out: LeaveOut = lambda target, error: False,
    ) -> None:
        self.image = image
        self.failures: dict[str, str] = {}
        self.skew_seconds = 0.0
        self._settings = settings
        self._rounds = rounds
        self._backoff, self._waits, self._sleep = backoff, waits, sleep
        self._leave_out = leave_out
        self._parts = {replica.target: _Part(replica=replica) for replica in replicas}
        self._decision: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._is_superseded = False
        self._punctual: list[_Part] = []

    async def run(self, commit: Callable[[], None]) -> None:
        """Returns when all replicas are done or have failed, or at the deadline; what is under way there goes on.

        `commit` is called once it is decided that the version is to be activated, before the first request says so.
        Raises QuorumNotStaged if it is decided otherwise, WeightsRefused if a replica refuses for good and is not
        left out.
        """
        deadline = time.monotonic() + self._settings.stage_timeout_seconds
        self._rounds.expect(self._parts)
        for part in self._parts.values():
            part.task = asyncio.create_task(self._take_part(part))
            part.task.add_done_callback(partial(self._part_ended, part))
        try:
            if self._settings.activation is ActivationMode.AS_STAGED:
                self._decide(commit)
            while not self._decision.done():
                await self._look(commit, deadline)
            if not self._decision.result():
                await self._give_up()
            await _wait([part.task for part in self._parts.values()], deadline - time.monotonic())
            await _wait([part.task for part in self._parts.values() if part.staged], _ACTIVATION_SECONDS)
        except BaseException:
            self.cancel()
            raise
        self._conclude()

    @property
    def is_done(self) -> bool:
        """True if nothing is under way any more."""
        return all(part.task is None or part.task.done() for part in self._parts.values())

    def supersede(self) -> None:
        """Says that a newer version is wanted: a transaction under way may end, nothing else is begun."""
        self._is_superseded = True
        for part in self._parts.values():
            if part.task is not None and part.replica.image is not self.image:
                part.task.cancel()

    def remove(self, target: str) -> None:
        """Says that a replica is gone; the quorum is one of the others."""
        part = self._parts.pop(target, None)
        if part is not None and part.task is not None:
            part.task.cancel()
        self._rounds.excuse(target)
        self._changed.set()

    def cancel(self) -> None:
        """Ends everything that is under way."""
        for part in self._parts.values():
            if part.task is not None:
                part.task.cancel()

    async def _take_part(self, part: _Part) -> None:
        replica = part.replica
        for attempt in range(self._settings.push_attempts):
            try:
                await self._try(part)
                return
            except WeightsRefused as error:
                if not self._leave_out(replica.target, error):
                    raise
                self.failures[replica.target] = str(error)
                self._parts.pop(replica.target, None)
                self._rounds.excuse(replica.target)
                return
            except SteersmanError as error:
                part.staged = None
                self._rounds.excuse(replica.target)
                if attempt + 1 == self._settings.push_attempts or self._is_superseded:
                    raise
                with self._waits.waiting(f"weights to {replica.target}"):
                    await self._sleep(max(self._backoff.delay(attempt), error.retry_after_seconds or 0.0))

    async def _try(self, part: _Part) -> None:
        """Stages, and activates or gives up as is decided; nothing if a newer version is wanted by now."""
        replica = part.replica
        async with replica.transaction(self.image):
            if self._is_superseded:
                return
            part.staged = await replica.stage(self.image)
            self._rounds.excuse(replica.target)
            self._changed.set()
            if self._decision.done() and self._decision.result():
                # Without letting go: who waits for the replica may want to send it a newer version.
                await self._activate(part, part.staged)
                return
        if await self._decision:
            async with replica.transaction(self.image):
                await self._activate(part, part.staged)
        elif part.staged.push_id:
            await replica.abort(part.staged.push_id)

    async def _activate(self, part: _Part, staged: Staged) -> None:
        if not staged.is_active:
            part.activation_began = time.monotonic()
            await part.replica.activate(self.image.version, staged.digest)
            part.activation_ended = time.monotonic()

    def _part_ended(self, part: _Part, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("weights %s did not reach %s: %s", self.image.version, part.replica.target, error)
        self._changed.set()

    async def _look(self, commit: Callable[[], None], deadline: float) -> None:
        """Decides, or waits until there is something new to decide on."""
        parts = self._parts.values()
        lost = [part for part in parts if part.task is not None and part.task.done()]
        num_staged = sum(part.staged is not None for part in parts)
        required = self._settings.required(len(parts))
        if num_staged >= required:
            self._decide(commit)
        elif len(parts) - len(lost) < required or time.monotonic() >= deadline or _refusal(lost) is not None:
            self._decision.set_result(False)
        else:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())

    def _decide(self, commit: Callable[[], None]) -> None:
        is_at_once = self._settings.activation is ActivationMode.AS_STAGED
        self._punctual = [part for part in self._parts.values() if is_at_once or part.staged is not None]
        commit()
        self._decision.set_result(True)

    async def _give_up(self) -> None:
        """Ends every part; what is staged is aborted on the way."""
        parts = list(self._parts.values())
        staged = [part.replica.target for part in parts if part.staged is not None]
        for part in parts:
            if part.staged is None and part.task is not None:
                part.task.cancel()
        await asyncio.gather(*(part.task for part in parts if part.task is not None), return_exceptions=True)
        if (refusal := _refusal(parts)) is not None:
            raise refusal
        missing = {part.replica.target: _reason(part) for part in parts if part.replica.target not in staged}
        raise QuorumNotStaged(
            f"weights {self.image.version} were staged by {len(staged)} of {len(parts)} replicas, needed are "
            f"{self._settings.required(len(parts))}; no replica has activated them. Missing: "
            + "; ".join(f"{target}: {reason}" for target, reason in missing.items())
        )

    def _conclude(self) -> None:
        parts = list(self._parts.values())
        for part in parts:
            if (reason := _reason(part)) is not None:
                self.failures[part.replica.target] = reason
            if part.task is not None and not part.task.done():
                _log.warning("weights %s: %s %s, the step goes on", self.image.version, part.replica.target, reason)
        if (refusal := _refusal(parts)) is not None:
            raise refusal
        active = [part for part in self._punctual if part.activation_ended is not None]
        if len(active) > 1:
            began = min(part.activation_began or 0.0 for part in active)
            self.skew_seconds = max(part.activation_ended or 0.0 for part in active) - began


def _reason(part: _Part) -> str | None:
    """Why a replica stayed behind; None if it did not."""
    task = part.task
    if task is None or not task.done():
        return "has not activated in time" if part.staged else "has not staged in time"
    if task.cancelled():
        return "has not staged in time"
    return str(error) if (error := task.exception()) is not None else None


def _refusal(parts: Iterable[_Part]) -> BaseException | None:
    """What no other try can mend: a WeightsRefused, or a defect."""
    for part in parts:
        task = part.task
        if task is not None and task.done() and not task.cancelled():
            error = task.exception()
            if error is not None and not isinstance(error, SteersmanError):
                return error
    return None


async def _wait(tasks: Iterable["asyncio.Task[None] | None"], seconds: float) -> None:
    under_way = [task for task in tasks if task is not None and not task.done()]
    if under_way:
        await asyncio.wait(under_way, timeout=max(0.0, seconds))
