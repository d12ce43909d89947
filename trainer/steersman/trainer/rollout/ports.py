"""The seams of a rollout: what it needs from the services, so that tests can stand in for them.

Failures are `SteersmanError`. What `steersman.trainer.retry.is_transient` says of them decides: wait and try
again, or give the sample up.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from steersman.client.types import Sample
from steersman.trainer.rollout.types import Completion, FloatArray, Prompt, SamplingSettings
from steersman.wire.errors import SteersmanError


class PolicyPort(Protocol):
    """One policy replica."""

    @property
    def target(self) -> str:
        """Where it is, for messages."""
        ...

    async def ready(self) -> None:
        """Returns once prompts would get through; SteersmanError if they would not."""
        ...

    def samples(self, prompt: Prompt, sampling: SamplingSettings) -> AsyncGenerator[Sample, None]:
        """Each sample once it has ended, in order of their ends. Closing the generator aborts the rest."""
        ...

    async def close(self) -> None:
        """Ends the connection."""
        ...


Connect = Callable[[str], PolicyPort]
"""Makes the port of a target ("host:port"). Does not wait: a replica that is away is told by its first call."""


class VersionGate(Protocol):
    """Knows which weights a replica must serve before it is sent a prompt."""

    async def ensure_current(self, target: str) -> None:
        """Returns once the replica at `target` serves the wanted weights, pushing them if need be; raises
        SteersmanError if it cannot be reached or brought there now.
        """
        ...

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        """True if these weights are of this attempt and of `oldest_step` or later.

        What is too old depends on the batch, not on the moment: a sample may be drawn long before it is trained on.
        """
        ...


class RewardPort(Protocol):
    """The reward service."""

    @property
    def target(self) -> str:
        """Where it is, for messages."""
        ...

    async def scores(self, completions: Sequence[Completion]) -> Sequence[float | SteersmanError]:
        """One finite score or one error for each completion, in their order. Raises if the whole call failed."""
        ...


class ReferencePort(Protocol):
    """The reference service."""

    @property
    def target(self) -> str:
        """Where it is, for messages."""
        ...

    async def logprobs(
        self, completions: Sequence[Completion], temperature: float
    ) -> Sequence[FloatArray | SteersmanError]:
        """Log-probs of the response tokens of each completion, in their order. Raises if the whole call
        failed.
        """
        ...
