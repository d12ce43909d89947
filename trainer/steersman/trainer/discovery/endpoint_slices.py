"""Replicas at the ready endpoints of a Kubernetes Service, by watching its EndpointSlices.

Invariants:

- List, then watch from the list's resource version; each event and bookmark moves it on, and the watch after one that
  ended in order goes on there. After anything else (410 Gone, a connection that broke, an API server restored from a
  backup) a new list says what there is.
- Nothing that fails changes the targets: only what the API server says does.
- The thread never waits for longer than a watch or `MAX_WAIT_SECONDS`, and ends within seconds of being told.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from steersman.trainer.discovery.address import ServiceAddress
from steersman.trainer.discovery.ports import DiscoveryRefused, Targets
from steersman.trainer.discovery.slice_api import ApiProblem, SliceApi
from steersman.trainer.discovery.slices import Slice, read_slices
from steersman.trainer.retry import Backoff

_log = logging.getLogger(__name__)

# The longest that a Retry-After is heeded.
MAX_WAIT_SECONDS: Final = 60.0
# Between the end of a watch and the next: a server that ends each at once must not be run over.
_BETWEEN_WATCHES_SECONDS: Final = 0.5
# In a row, after which the credentials are read and the connection is made anew: the API server may have moved.
_FAILURES_BEFORE_RECONNECT: Final = 3
# A watch that held for so long was a good one, even if it broke off then (proxies cut long responses).
_GOOD_WATCH_SECONDS: Final = 5.0
_STOP_SECONDS: Final = 5.0
# Tries of a refused request before the first answer. A grant that was made with the job takes a moment to count.
_REFUSALS_BEFORE_GIVING_UP: Final = 4
_REFUSALS: Final = frozenset({401, 403, 404})

Connect = Callable[[str, str | None], SliceApi]
Pause = Callable[[threading.Event, float], object]
"""Waits so many seconds, or until the event is set."""


def connect_cluster(service: str, namespace: str | None) -> SliceApi:
    """The API server that this process belongs to. DiscoveryRefused if it belongs to none."""
    try:
        from steersman.trainer.discovery.cluster import connect  # needs an optional package
    except ImportError as error:
        raise DiscoveryRefused(
            f"k8s:/// addresses need the package kubernetes ({error}): pip install kubernetes"
        ) from None
    return connect(service, namespace)


class EndpointSliceDiscovery:
    """The ready endpoints of one Service."""

    def __init__(
        self,
        address: ServiceAddress,
        *,
        connect: Connect = connect_cluster,
        backoff: Backoff | None = None,
        pause: Pause = threading.Event.wait,
    ) -> None:
        self._address = address
        self._connect = connect
        self._backoff = backoff or Backoff(initial_seconds=0.5, max_seconds=30.0)
        self._pause = pause
        self.problem = ""

    @property
    def name(self) -> str:
        """The address as in the settings."""
        return str(self._address)

    async def targets(self) -> AsyncGenerator[Targets, None]:
        """See `Discovery.targets`."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Targets | Exception] = asyncio.Queue(1)

        def replace(item: Targets | Exception) -> None:
            while not news.empty():
                news.get_nowait()
            news.put_nowait(item)

        def show(item: Targets | Exception) -> None:
            try:
                loop.call_soon_threadsafe(replace, item)
            except RuntimeError:  # the loop has ended: nobody wants to know
                watcher.stop()

        def note(problem: str) -> None:
            self.problem = problem

        watcher = _Watcher(self._address, self._connect, self._backoff, self._pause, show, note)
        watcher.start()
        shown: Targets | None = None
        try:
            while True:
                item = await news.get()
                if isinstance(item, Exception):
                    raise item
                if item != shown:
                    yield item
                    shown = item
        finally:
            watcher.stop()
            await asyncio.to_thread(watcher.join, _STOP_SECONDS)


class _Watcher(threading.Thread):
    def __init__(
        self,
        address: ServiceAddress,
        connect: Connect,
        backoff: Backoff,
        pause: Pause,
        show: Callable[[Targets | Exception], None],
        note: Callable[[str], None],
    ) -> None:
        # A daemon: `stop` is bounded, but a connect that hangs must not hold up the end of the process.
        super().__init__(name=f"steersman-watch-{address.service}", daemon=True)
        self._address = address
        self._connect = connect
        self._backoff = backoff
        self._pause = pause
        self._show = show
        self._note = note
        self._stopped = threading.Event()
        self._api: SliceApi | None = None
        self._slices: dict[str, Slice] = {}
        self._resource_version: str | None = None
        self._answered = False
        self._num_failures = 0
        self._problem = ""

    def stop(self) -> None:
        """Ends the thread, whatever it waits for."""
        self._stopped.set()
        if (api := self._api) is not None:
            api.interrupt()

    def run(self) -> None:
        """List and watch until stopped."""
        try:
            while not self._stopped.is_set():
                try:
                    self._follow()
                    wait_seconds = _BETWEEN_WATCHES_SECONDS * (1.0 + random.random())
                except ApiProblem as problem:
                    if self._stopped.is_set():
                        return
                    wait_seconds = self._fails(problem)
                self._pause(self._stopped, wait_seconds)
        except Exception as error:  # refused for good, or a defect: whoever waits must hear of it
            self._show(error)
        finally:
            self._disconnect()

    def _follow(self) -> None:
        """One watch, to its end; a list before it if there is none to go on from."""
        if self._api is None:
            self._api = self._connect(self._address.service, self._address.namespace)
        api = self._api
        if self._resource_version is None:
            listing = api.list_slices()
            self._slices = {one["metadata"]["name"]: one for one in listing.slices}
            self._resource_version = listing.resource_version
            self._answered = True
            self._tell()
        started = time.monotonic()
        try:
            for event in api.watch_slices(self._resource_version):
                if self._stopped.is_set():
                    return
                self._apply(event.get("type", ""), event["object"])
                self._num_failures = 0
        except ApiProblem:
            if time.monotonic() - started >= _GOOD_WATCH_SECONDS:
                self._num_failures = 0
            raise
        self._num_failures = 0

    def _apply(self, kind: str, thing: dict[str, Any]) -> None:
        if kind == "ERROR":
            raise ApiProblem(int(thing.get("code") or 0), thing.get("message") or "the watch failed")
        metadata = thing.get("metadata") or {}
        name = metadata.get("name")
        if kind in ("ADDED", "MODIFIED") and name:
            self._slices[name] = thing
        elif kind == "DELETED" and name:
            self._slices.pop(name, None)
        self._resource_version = metadata.get("resourceVersion") or self._resource_version
        self._tell()

    def _tell(self) -> None:
        found = read_slices(self._slices.values(), self._address.port)
        problem = found.problem
        if not found.targets and not problem:
            problem = (
                f"{found.num_unready} endpoints, none ready"
                if self._slices
                else "no EndpointSlices: is there a Service?"
            )
        self._set_problem(problem)
        self._show(found.targets)

    def _fails(self, problem: ApiProblem) -> float:
        """Says it, prepares the next try, and returns how long to wait before it, in seconds."""
        self._resource_version = None
        attempt, self._num_failures = self._num_failures, self._num_failures + 1
        if problem.status == 410 and not attempt:
            _log.info("%s: the API server has forgotten where the watch was, listing anew", self._address)
            return 0.0
        self._set_problem(_explain(problem, self._address, self._api))
        if problem.status in _REFUSALS and not self._answered and self._num_failures >= _REFUSALS_BEFORE_GIVING_UP:
            raise DiscoveryRefused(f"{self._address}: {self._problem}")
        if problem.status == 401 or self._num_failures % _FAILURES_BEFORE_RECONNECT == 0:
            self._disconnect()
        return min(max(self._backoff.delay(attempt), problem.retry_after_seconds or 0.0), MAX_WAIT_SECONDS)

    def _set_problem(self, problem: str) -> None:
        if problem and problem != self._problem:
            _log.warning("%s: %s", self._address, problem)
        elif self._problem and not problem:
            _log.info("%s answers again", self._address)
        self._problem = problem
        self._note(f"{self._address}: {problem}" if problem else "")

    def _disconnect(self) -> None:
        api, self._api = self._api, None
        if api is not None:
            api.close()


def _explain(problem: ApiProblem, address: ServiceAddress, api: SliceApi | None) -> str:
    namespace = api.namespace if api is not None else address.namespace or "?"
    match problem.status:
        case 403:
            return (
                f"{problem} -- the trainer's ServiceAccount needs a Role in namespace {namespace} with apiGroups "
                '["discovery.k8s.io"], resources ["endpointslices"], verbs ["list", "watch"], and a RoleBinding to it'
            )
        case 401:
            return f"{problem} -- the token or client certificate is not (or no longer) valid"
        case 404:
            return f"{problem} -- the API server has no discovery.k8s.io/v1 (Kubernetes 1.21 and later have it)"
        case 429:
            return f"{problem} -- the API server is busy"
    return str(problem)
