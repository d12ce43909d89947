"""What the reference service needs of a model, free of gRPC, protobuf and torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steersman.wire.identity import ModelInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobQuery:
    """One sequence, checked: prompt followed by response.

    Example: `token_ids=[5, 6, 7, 8], prompt_length=2` asks for log p(7 | 5, 6) and log p(8 | 5, 6, 7).
    """

    token_ids: NDArray[np.int32]
    prompt_length: int
    temperature: float = 1.0
    include_entropy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobRow:
    """Natural-log probabilities of the response tokens and, if asked for, entropies in nats. float32, same length."""

    logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32] | None = None


class LogprobEngine(Protocol):
    """A frozen model. `compute` blocks, and is called on one thread only."""

    @property
    def model(self) -> ModelInfo:
        """What is served."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows with a common beginning are cheaper in one batch, and padding costs nothing."""
        ...

    def compute(self, queries: Sequence[LogprobQuery]) -> list[LogprobRow]:
        """One row a query, in order. Values are not checked: a broken model gives NaN."""
        ...
