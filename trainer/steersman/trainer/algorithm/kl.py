"""KL divergence between policy and reference: estimators from samples, and controllers of its coefficient."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Per-token estimate of ``KL(policy || reference)`` in nats from tokens that the policy sampled.

    With ``log r = ref_logprobs - logprobs``:

    - ``k1 = -log r`` is unbiased and of high variance;
    - ``k2 = (log r)^2 / 2`` has low variance and a small bias;
    - ``k3 = r - 1 - log r`` is unbiased, never negative and of low variance.

    Shapes ``[...]`` alike, and so is the result. ValueError for an unknown estimator.

    Source: J. Schulman, "Approximating KL Divergence", 2020.
    """
    log_r = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * log_r.square()
    if estimator == "k3":
        # expm1 keeps the digits that exp(x) - 1 cancels when the two models are close.
        return log_r.expm1() - log_r
    raise ValueError(f"estimator is {estimator!r}, must be one of 'k1', 'k2', 'k3'")


class KLController(Protocol):
    """Gives the KL coefficient, and learns from the KL that was measured."""

    @property
    def coefficient(self) -> float:
        """The coefficient to use for the next batch."""
        ...

    def update(self, kl: float, num_samples: int) -> None:
        """Takes in ``kl``, the mean KL of a sequence in nats, over ``num_samples`` sequences."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        ...


@dataclass(kw_only=True)
class FixedKLController:
    """A coefficient that stays where it was set."""

    coefficient: float

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(f"coefficient is {self.coefficient}, must be at least 0")

    def update(self, kl: float, num_samples: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to restore: the setting rules, so that a resumed run can be given another coefficient."""


@dataclass(kw_only=True)
class AdaptiveKLController:
    """Moves the coefficient in proportion to the relative error of the KL, to hold it at ``target``.

    ``error = clip(kl / target - 1, -0.2, 0.2)``, then ``coefficient *= 1 + error * num_samples / horizon``.
    ``target`` is in nats per sequence, ``horizon`` in sequences: at a constant error of 0.2, the coefficient
    grows by about a fifth each ``horizon`` sequences. Source: Ziegler et al., "Fine-Tuning Language Models
    from Human Preferences", arXiv 1909.08593, section 2.2 (there as the gain ``K = num_samples / horizon =
    0.1``).
    """

    coefficient: float
    target: float
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if self.coefficient <= 0:
            raise ValueError(f"coefficient is {self.coefficient}, must be above 0 for an adaptive controller")
        if self.target <= 0:
            raise ValueError(f"target is {self.target}, must be above 0 nats")
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}, must be at least 1 sequence")

    def update(self, kl: float, num_samples: int) -> None:
        """One step of the proportional controller."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        # A batch larger than five horizons would otherwise turn the coefficient negative.
        self.coefficient *= max(1.0 + error * num_samples / self.horizon, 0.1)

    def state_dict(self) -> dict[str, float]:
        """The coefficient reached."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from the coefficient reached."""
        self.coefficient = state["coefficient"]
