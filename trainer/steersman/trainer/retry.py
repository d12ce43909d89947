"""Waiting for services: which errors pass by themselves, how long to wait for them, and saying so meanwhile.

Invariants:

- Only failures that another try can mend are waited out; a bad request is never sent twice.
- Every wait ends: after `Backoff.give_up_seconds` without success the last error is raised.
- Whoever waits stands in `Waits`, so that a progress line can name what a run waits for and for how long.
"""

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, TypeVar

from steersman.wire.errors import Code, Reason, SteersmanError

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]

# What a restart, a full queue or a broken connection looks like from the client. UNKNOWN is what a proxy in
# between says.
_TRANSIENT: Final = frozenset(
    {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.UNKNOWN}
)


def is_transient(error: SteersmanError) -> bool:
    """True if the same call may succeed later: the service is away, starting, full or slow.

    An INTERNAL error or DATA_LOSS without a reason of ours is a connection that broke in the middle of a
    message.
    """
    if error.reason is Reason.REQUEST_TOO_LARGE:
        return False
    broken_stream = error.reason is None and error.code in (Code.INTERNAL, Code.DATA_LOSS)
    return error.code in _TRANSIENT or broken_stream


class GaveUp(Exception):
    """A service stayed away for longer than the settings allow. The cause is the last error."""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait between tries, and when to give up. All in seconds.

    The wait doubles from `initial_seconds` up to `max_seconds`, less up to half of it by chance, so that many
    callers do not come back at the same moment.
    """

    initial_seconds: float = 0.25
    max_seconds: float = 5.0
    give_up_seconds: float = 1800.0

    def delay(self, attempt: int) -> float:
        """The wait after failed try number `attempt`, counted from 0."""
        # The exponent is bounded: 2.0 ** 1024 overflows in a run that waits for hours.
        ceiling = min(self.initial_seconds * 2.0 ** min(attempt, 32), self.max_seconds)
        return ceiling * (1.0 - 0.5 * random.random())


@dataclass(kw_only=True)
class Waits:
    """What is being waited for. Written by the event loop, read by the thread that reports progress."""

    clock: Callable[[], float] = time.monotonic
    _since: dict[str, float] = field(default_factory=dict)
    _holders: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says inside that `what` ("reward at 127.0.0.1:50053") is waited for; several may wait for the same."""
        with self._lock:
            self._since.setdefault(what, self.clock())
            self._holders[what] = self._holders.get(what, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._holders[what] -= 1
                if not self._holders[what]:
                    del self._holders[what], self._since[what]

    def text(self) -> str:
        """For example "waiting for reward at 127.0.0.1:50053: 12 s"; empty if nothing is away."""
        with self._lock:
            now = self.clock()
            parts = [f"{what}: {now - since:.0f} s" for what, since in sorted(self._since.items())]
        return f"waiting for {', '.join(parts)}" if parts else ""


async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    what: str,
    backoff: Backoff,
    waits: Waits,
    sleep: Sleep = asyncio.sleep,
    retryable: Callable[[SteersmanError], bool] = is_transient,
) -> T:
    """The result of `call`, tried until it succeeds, fails for good, or `backoff.give_up_seconds` have
    passed.

    Raises the SteersmanError of a failure that no other try can mend, and GaveUp at the end of the patience.
    """
    started: float | None = None
    attempt = 0
    while True:
        try:
            if started is None:
                return await call()
            with waits.waiting(what):
                return await call()
        except SteersmanError as error:
            if not retryable(error):
                raise
            now = waits.clock()
            started = now if started is None else started
            if now - started >= backoff.give_up_seconds:
                raise GaveUp(f"{what} stayed away for {now - started:.0f} s: {error}") from error
            delay = max(backoff.delay(attempt), error.retry_after_seconds or 0.0)
            attempt += 1
        with waits.waiting(what):
            await sleep(min(delay, backoff.give_up_seconds))
