"""How versions are published."""

import math
from dataclasses import dataclass
from enum import StrEnum

from steersman.client.types import KvCachePolicy
from steersman.trainer.weights.encode import PushEncoding


class ActivationMode(StrEnum):
    """When a replica switches to new weights."""

    AS_STAGED = "as_staged"
    """As soon as it has them."""
    ALL_OR_NOTHING = "all_or_nothing"
    """When a quorum of the replicas has them."""


@dataclass(frozen=True, kw_only=True)
class PublishSettings:
    """How versions are published.

    Attributes:
        activation: when replicas switch.
        quorum: share of the replicas, (0, 1], that must have staged before any activates; for ALL_OR_NOTHING.
        stage_timeout_seconds: how long a publication waits for replicas. Those that have not staged by then stay
            behind; what is under way there goes on.
        push_attempts: tries at one replica within a publication.
        encoding: how weights travel to replicas that serve a version of late; but for DENSE the deltas of late versions
            are kept.
        delta_history_bytes: of deltas that are kept beside the newest, for each layout of the weights that a replica
            has shown; never more than the dense weights.
        kv_cache: what becomes of the cache of running requests.
    """

    activation: ActivationMode = ActivationMode.AS_STAGED
    quorum: float = 1.0
    stage_timeout_seconds: float = 600.0
    push_attempts: int = 3
    encoding: PushEncoding = PushEncoding.AUTO
    delta_history_bytes: int = 256 * 2**20
    kv_cache: KvCachePolicy = KvCachePolicy.SERVER_DEFAULT

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}, allowed: (0, 1]")
        if not self.stage_timeout_seconds > 0:
            raise ValueError(f"stage_timeout_seconds is {self.stage_timeout_seconds}, allowed: above 0")

    def required(self, num_replicas: int) -> int:
        """How many of so many replicas are a quorum."""
        # Less than a rounding error: 0.1 of 30 are three.
        return math.ceil(self.quorum * num_replicas - 1e-9)
