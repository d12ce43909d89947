"""What a publication did."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """What a publication did.

    Attributes:
        seconds: until the last replica was done or had failed, or the deadline.
        pushed_bytes: that left this process, over all replicas.
        delta_share: of the elements, over all replicas, that travelled as a sparse delta.
        pause_seconds: the longest time that generation stood still at one replica.
        activation_skew_seconds: no two replicas activated further apart (see `Publication`).
        failures: why, by target, for replicas that stayed behind.
    """

    seconds: float
    pushed_bytes: int = 0
    delta_share: float = 0.0
    pause_seconds: float = 0.0
    activation_skew_seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
