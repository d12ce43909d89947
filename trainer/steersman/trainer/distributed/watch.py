"""Ranks that stand still without dying are found, and the job ends with their names instead of hanging.

A thread of every rank tells the others through torchrun's store, every few seconds, that it lives, and how long ago
its rank got on with its work: a forward pass, a collective, a look at what it waits for. Each rank judges all others:

- one whose thread is silent for longer than the patience is stopped, starved, or stuck with the interpreter in its
  hands: it stands still;
- a rank that lives and does not get on may wait for one that does. Only when *no* rank has got on for longer than the
  patience, and what its present phase may take beyond that, one stands still: of those that are in no collective, the
  one that stopped first.

The first to say so is right. It records that the job failed; all ranks write their stacks to their logs and end, and
with them what held them: no collective, file system or device is asked to let go. What another process of the same
torchrun can do for a rank that does not even hear of it is done by signals.

Times are those of the clock of the rank that measures them; none are compared between machines.
"""

import faulthandler
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Final

import psutil

_log = logging.getLogger(__name__)

START_SECONDS: Final = 1800.0
"""How long a rank may take beyond the patience before its first forward pass: it reads models and data."""
LONG_SECONDS: Final = 600.0
"""How long what a rank announces may take beyond the patience, such as a checkpoint that it writes or checks."""
# Beats in the patience: enough that a few may come late.
_BEATS: Final = 12
_MAX_BEAT_SECONDS: Final = 5.0
# What a rank does may change many times in that.
_NEWS_SECONDS: Final = 0.2
# For the rank that speaks to record the end, and for one that stands still to write its stacks.
_LAST_SECONDS: Final = 15.0
# stderr, whatever Python's was replaced by.
_LOG_DESCRIPTOR: Final = 2
_VERDICT_KEY: Final = "steersman/stands-still"
FAILURE_KEY: Final = "steersman/failure"
"""Where the rank that fails first says why."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        beat: counts up; node: the name of its machine.
        idle: seconds since it last got on, as of now.
        allowance: seconds that its phase may take beyond the patience.
        doing: the phase, for people.
        waits: it is in a collective, so others may have to get on first.
    """

    beat: int
    node: str
    idle: float
    allowance: float
    doing: str
    waits: bool = False


class Marks:
    """How a rank gets on. Made by the thread that works, read by the one that watches."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._allowance = START_SECONDS
        self._doing = "starting"
        self._waits = False
        self.news = threading.Event()

    def mark(self) -> None:
        """It got on."""
        self._at = self._clock()

    def note(self, doing: str) -> None:
        """It got on, to something else."""
        if doing != self._doing:
            self._doing = doing
            self.news.set()
        self.mark()

    def begun(self) -> None:
        """It got on, and is past its start."""
        if self._allowance == START_SECONDS:
            self._allowance = 0.0
        self.mark()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside it waits for the others; then it got on."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            self.mark()

    @contextmanager
    def long(self, doing: str) -> Iterator[None]:
        """What is done inside may take `LONG_SECONDS` more."""
        before = self._allowance, self._doing
        self._allowance = max(LONG_SECONDS, self._allowance)
        self.note(doing)
        try:
            yield
        finally:
            self._allowance, self._doing = before
            self.mark()

    def sign(self, beat: int, node: str) -> Sign:
        """As of now."""
        idle = self._clock() - self._at
        return Sign(beat=beat, node=node, idle=idle, allowance=self._allowance, doing=self._doing, waits=self._waits)


class Observer:
    """What one rank knows of all, itself among them, and what it makes of it."""

    def __init__(self, size: int, *, patience: float, now: float) -> None:
        self._patience = patience
        self._size = size
        self._signs: dict[int, Sign] = {}
        self._changed = dict.fromkeys(range(size), now)

    def hear(self, rank: int, sign: Sign, *, now: float) -> None:
        """What the store holds of a rank."""
        known = self._signs.get(rank)
        if known is None or known.beat != sign.beat:
            self._signs[rank], self._changed[rank] = sign, now

    def forgive(self, now: float) -> None:
        """The observer was away itself: nobody was silent as far as it knows."""
        self._changed = dict.fromkeys(self._changed, now)

    def verdict(self, now: float) -> tuple[int, str] | None:
        """The rank that stands still, and how that shows; None while the job may get on."""
        silent = {rank: now - changed for rank, changed in self._changed.items()}
        limits = {rank: self._patience + (0.0 if rank in self._signs else START_SECONDS) for rank in silent}
        if mute := [rank for rank in silent if silent[rank] > limits[rank]]:
            rank = max(mute, key=lambda one: silent[one])
            return rank, f"no sign of it for {silent[rank]:.0f} s"
        if len(self._signs) < self._size:
            return None
        idle = {rank: sign.idle + silent[rank] for rank, sign in self._signs.items()}
        if any(idle[rank] <= self._patience + sign.allowance for rank, sign in self._signs.items()):
            return None
        suspects = [rank for rank, sign in self._signs.items() if not sign.waits] or list(idle)
        rank = max(suspects, key=lambda one: idle[one])
        return rank, f"it has not got on for {idle[rank]:.0f} s, and no other rank has for {min(idle.values()):.0f} s"

    def describe(self, rank: int, how: str) -> str:
        """The error of the job."""
        others = "; ".join(
            f"rank {one}: {sign.doing}{' (waits for others)' if sign.waits else ''}"
            for one, sign in sorted(self._signs.items())
            if one != rank
        )
        sign = self._signs.get(rank)
        node, doing = (sign.node, sign.doing) if sign is not None else ("unknown", "starting")
        return (
            f"rank {rank} of {self._size} on node {node} stands still: {how}. It last did: {doing}. The others: "
            f"{others or 'no sign'}. The stacks are in the log; resume the job to go on from its last checkpoint"
        )


class Watch:
    """The thread of one rank. Until it is begun, and in one that is closed, marks are made in vain.

    Args:
        store: torchrun's, through a connection that nothing else uses.
        on_verdict: given the error, records the end of the job; called on the one rank that speaks, as its last act.
    """

    def __init__(self, store: Any, *, rank: int, size: int, on_verdict: Callable[[str], None]) -> None:
        self.marks = Marks()
        self._store, self._rank, self._size = store, rank, size
        self._on_verdict = on_verdict
        self._node = socket.gethostname()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, patience: float) -> None:
        """Watches from now on, with so many seconds of patience. Not again."""
        if self._thread is not None:
            return
        faulthandler.register(signal.SIGUSR1, file=_LOG_DESCRIPTOR, all_threads=True)
        self._store.set_timeout(timedelta(seconds=max(10.0, patience)))
        self._thread = threading.Thread(target=self._watch, args=(patience,), name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank has come to its end; the others do not wait for a sign of it."""
        self._closed.set()
        self.marks.news.set()
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)

    def _watch(self, patience: float) -> None:
        pause = min(_MAX_BEAT_SECONDS, patience / _BEATS)
        try:
            self._observe(Observer(self._size, patience=patience, now=time.monotonic()), pause, patience)
        except RuntimeError as error:
            # torchrun is gone, or about to be; who starts the job knows that.
            _log.debug("the watch ends with its store: %s", error)

    def _observe(self, observer: Observer, pause: float, patience: float) -> None:
        beat, last = 0, time.monotonic()
        gone: set[int] = set()
        while True:
            beat += 1
            ended = self._closed.is_set()
            self._store.set(_key(self._rank), json.dumps(asdict(self.marks.sign(0 if ended else beat, self._node))))
            if ended:
                return
            if self._store.check([_VERDICT_KEY]):
                self._end(json.loads(self._store.get(_VERDICT_KEY)), speaks=False)
            now = time.monotonic()
            if now - last > patience / 2:
                observer.forgive(now)
            last = now
            for rank in set(range(self._size)) - gone:
                if self._store.check([_key(rank)]):
                    sign = Sign(**json.loads(self._store.get(_key(rank))))
                    observer.hear(rank, sign, now=now)
                    if sign.beat == 0:
                        gone.add(rank)
            found = observer.verdict(now) if not gone else None
            if found is not None:
                self._speak(found[0], observer.describe(*found))
            if self.marks.news.wait(pause):
                self._closed.wait(_NEWS_SECONDS)
                self.marks.news.clear()

    def _speak(self, rank: int, error: str) -> None:
        # What failed before may be why this one stands still.
        error = str(self._store.compare_set(FAILURE_KEY, "", error), "utf-8")
        verdict = json.dumps({"rank": rank, "error": error, "by": self._rank})
        said = str(self._store.compare_set(_VERDICT_KEY, "", verdict), "utf-8")
        self._end(json.loads(said), speaks=said == verdict)

    def _end(self, verdict: Mapping[str, Any], *, speaks: bool) -> None:
        """The last that this process does."""
        deadline = time.monotonic() + _LAST_SECONDS
        _log.error("%s", verdict["error"])
        faulthandler.dump_traceback(file=_LOG_DESCRIPTOR, all_threads=True)
        try:
            if speaks:
                self._on_verdict(str(verdict["error"]))
            if verdict["rank"] != self._rank:
                self._rouse(int(verdict["rank"]), deadline)
            if not speaks:
                # torchrun ends all with the first that ends: the one that speaks comes first.
                time.sleep(max(0.0, deadline - time.monotonic()))
        finally:
            os._exit(1)

    def _rouse(self, rank: int, deadline: float) -> None:
        """Has a rank of the same torchrun write its stacks, and ends it; once, whoever of its siblings comes first."""
        if self._store.add(f"steersman/roused/{self._node}", 1) > 1:
            return
        with suppress(psutil.Error):
            for process in psutil.Process(os.getppid()).children():
                if process.environ().get("RANK") != str(rank):
                    continue
                process.send_signal(signal.SIGUSR1)
                process.send_signal(signal.SIGCONT)
                with suppress(psutil.TimeoutExpired):
                    process.wait(max(1.0, (deadline - time.monotonic()) / 2))
                process.kill()


def _key(rank: int) -> str:
    return f"steersman/sign/{rank}"
