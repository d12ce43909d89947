"""Lets a call in, or says why not: is the caller known, may it do this, and does it not have too many calls already?"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from steersman.serving.security.access import AccessList, authorize
from steersman.wire.errors import Reason, SteersmanError

_RETRY_SECONDS: Final = 1.0


class Gate:
    """The gate of one server. Lives on its event loop.

    Args:
        access: the callers; None: everybody who can connect may do everything.
        max_calls_per_caller: in flight at once; None: no bound of its own. Without `access` a caller is an address.
    """

    def __init__(self, access: AccessList | None = None, max_calls_per_caller: int | None = None) -> None:
        self._access = access
        self._max_calls = max_calls_per_caller
        self._calls: Counter[str] = Counter()

    @contextmanager
    def admit(self, method: str, *, token: str | None, certificate_names: Iterable[str], address: str) -> Iterator[str]:
        """Holds a place for the call while it runs; gives the name of the caller.

        Raises UNAUTHENTICATED, PERMISSION_DENIED, or QUEUE_FULL for a caller with too many calls.
        """
        name = address
        if self._access is not None:
            name = authorize(method, self._access.find(token, certificate_names)).name
        if self._max_calls is not None and self._calls[name] >= self._max_calls:
            raise SteersmanError(
                Reason.QUEUE_FULL,
                f"{name} has {self._max_calls} calls in flight, which is as many as one caller may have",
                retry_after_seconds=_RETRY_SECONDS,
            )
        self._calls[name] += 1
        try:
            yield name
        finally:
            self._calls[name] -= 1
            if not self._calls[name]:
                del self._calls[name]
