"""Replicas that were named one by one."""

from collections.abc import AsyncGenerator, Sequence

from steersman.trainer.discovery.ports import Targets


class StaticDiscovery:
    """A list that never changes."""

    problem = ""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = tuple(dict.fromkeys(targets))

    @property
    def name(self) -> str:
        """The list."""
        return ", ".join(self._targets)

    async def targets(self) -> AsyncGenerator[Targets, None]:
        """The list, once."""
        yield self._targets
