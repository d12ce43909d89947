"""The seam between the watch over EndpointSlices and the API server."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from steersman.cluster.problem import ApiProblem

__all__ = ["ApiProblem", "Listing", "SliceApi"]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The slices of a Service at one moment.

    Attributes:
        slices: as the API server sends them.
        resource_version: where a watch goes on from.
    """

    slices: tuple[dict[str, Any], ...]
    resource_version: str


class SliceApi(Protocol):
    """The EndpointSlices of one Service. For one thread, but `interrupt`."""

    namespace: str

    def list_slices(self) -> Listing:
        """All slices now. Raises ApiProblem."""
        ...

    def watch_slices(self, resource_version: str) -> Iterator[dict[str, Any]]:
        """Watch events after `resource_version`, until the server ends the watch. Raises ApiProblem."""
        ...

    def interrupt(self) -> None:
        """Ends a watch under way, from any thread."""
        ...

    def close(self) -> None:
        """Ends the connections."""
        ...
