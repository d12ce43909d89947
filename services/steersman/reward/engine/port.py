"""What a model scorer needs of a model, free of gRPC, protobuf and torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steersman.wire.identity import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """Score = (raw - mean) / std, fitted when the model was trained and stored in its configuration."""

    mean: float = 0.0
    std: float = 1.0

    def apply(self, raw: float) -> float:
        """The normalised score."""
        return (raw - self.mean) / self.std


class ScoreEngine(Protocol):
    """A scalar-head model. `score` blocks, and is called on as many threads as there are workers."""

    @property
    def model(self) -> ModelInfo:
        """What is served."""
        ...

    @property
    def normalization(self) -> Normalization:
        """What the model's configuration says; the identity by default."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether what rows of a call begin with in common is computed once, and nothing is padded."""
        ...

    @property
    def num_workers(self) -> int:
        """Calls of `score` that it computes best side by side, each with a batch of its own."""
        ...

    def close(self) -> None:
        """Frees what outlives the object; nothing is scored after it. Blocks."""
        ...

    def score(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        """The raw score of each row of token ids, in order. Values are not checked: a broken model gives NaN."""
        ...


class LoadedEngine(ScoreEngine, Protocol):
    """An engine as its backend loads it, with what is asked of it once."""

    @property
    def encoding(self) -> str | None:
        """How the model was trained to see text, if it says so: see `steersman.reward.text`."""
        ...

    @property
    def device_type(self) -> str:
        """Kind of torch device: "cpu", "cuda", ..."""
        ...

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its weights."""
        ...
