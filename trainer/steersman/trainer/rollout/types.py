"""What goes into a rollout and what comes out. A worked example, prompt "2+2=" of two samples:

>>> prompt = Prompt(index=0, token_ids=np.array([5, 6, 5, 7], np.int32))
>>> rollout = Rollout(
...     prompt=prompt,
...     sample=1,                                              # the second of the two
...     response_ids=np.array([8, 2], np.int32),               # "4", end of sequence
...     behaviour_logprobs=np.array([-0.1, -0.3], np.float32), # under the weights that drew each token
...     ref_logprobs=np.array([-0.2, -0.3], np.float32),       # of the same tokens under the reference
...     weight_versions=(VersionSpan(version=WeightVersion(run_id="demo.1", step=3), start=0, end=2),),
...     score=1.5,
...     finish_reason=FinishReason.STOP,                       # not cut off: no missing-EOS penalty
... )
>>> rollout.key, rollout.num_tokens, rollout.token_steps
((0, 1), 6, array([3, 3], dtype=int32))
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.client.types import FinishReason
from steersman.wire.identity import VersionSpan, WeightVersion

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]

__all__ = [
    "Completion",
    "Drop",
    "FinishReason",
    "FloatArray",
    "IntArray",
    "Prompt",
    "Rollout",
    "RolloutBatch",
    "SamplingSettings",
    "VersionSpan",
    "WeightVersion",
    "describe_drops",
    "token_steps",
]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a batch.

    Attributes:
        index: number of the prompt in its batch; unique there.
        token_ids: int32[length], at least one.
        text: as text, for scorers with a tokenizer of their own and for the sample log; may be empty.
        context: JSON facts for scoring functions.
    """

    index: int
    token_ids: IntArray
    text: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are drawn: from the whole distribution at `temperature`, so that log-probs are those of
    softmax(z / T).
    """

    num_samples: int = 1
    temperature: float = 1.0
    max_tokens: int = 64
    min_tokens: int = 0
    ignore_eos: bool = False
    # Among requests that wait at a replica, those with a lower number go first.
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished response, before it is scored. Arrays as in `Rollout`."""

    prompt: Prompt
    sample: int
    response_ids: IntArray
    behaviour_logprobs: FloatArray
    weight_versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One whole sample: everything the update needs.

    Attributes:
        prompt: what was responded to.
        sample: which of the samples of that prompt.
        response_ids: int32[length], at least one; with the end-of-sequence token if one was drawn.
        behaviour_logprobs: float32[length], log-prob of each token under the distribution that it was drawn
            from.
        ref_logprobs: float32[length], log-prob of the same tokens under the reference at the same
            temperature.
        weight_versions: which weights drew which tokens; together they cover all tokens, in order.
        score: finite; of the reward service.
        finish_reason: STOP (by itself) or LENGTH (cut off).
    """

    prompt: Prompt
    sample: int
    response_ids: IntArray
    behaviour_logprobs: FloatArray
    ref_logprobs: FloatArray
    weight_versions: tuple[VersionSpan, ...]
    score: float
    finish_reason: FinishReason

    @property
    def key(self) -> tuple[int, int]:
        """What makes the sample one of its kind in a batch."""
        return self.prompt.index, self.sample

    @property
    def num_tokens(self) -> int:
        """Prompt and response together."""
        return len(self.prompt.token_ids) + len(self.response_ids)

    @property
    def token_steps(self) -> IntArray:
        """int32[length]: step of the weights that drew each response token."""
        return token_steps(self.weight_versions, len(self.response_ids))


def token_steps(spans: Sequence[VersionSpan], num_tokens: int) -> IntArray:
    """int32[num_tokens]: step of the weights that drew each token. ValueError unless `spans` cover all tokens once,
    in order.
    """
    ends = [0, *(span.end for span in spans)]
    if ends[-1] != num_tokens or any(not end == span.start < span.end for end, span in zip(ends, spans, strict=False)):
        covered = ", ".join(f"[{span.start}, {span.end})" for span in spans)
        raise ValueError(f"weight versions cover {covered or 'nothing'}, must cover [0, {num_tokens}) without gaps")
    return np.repeat([span.version.step for span in spans], np.diff(ends)).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A sample that is missing from its batch, and why.

    Attributes:
        key: which sample.
        service: name and address of the service that failed it ("reward at 127.0.0.1:50053").
        cause: in one word, the same for drops of one cause ("ENGINE_ERROR"); empty if there is none.
        reason: what happened, for people.
    """

    key: tuple[int, int]
    service: str
    reason: str
    cause: str = ""

    def __str__(self) -> str:
        return f"sample {self.key[0]}.{self.key[1]}, {self.service}: {self.reason}"


def describe_drops(drops: Sequence[Drop], *, num_shown: int = 3) -> str:
    """What failed the samples: how many by which service for which cause, most first, then the first few in full."""
    counts = Counter((drop.service, drop.cause) for drop in drops)
    groups = [
        f"{count} by {service}" + (f" ({cause})" if cause else "") for (service, cause), count in counts.most_common()
    ]
    shown = "; ".join(str(drop) for drop in drops[:num_shown])
    return f"{', '.join(groups)}; first: {shown}"


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """All samples of a batch of prompts: `len(rollouts) + len(drops)` is prompts times samples.

    Attributes:
        rollouts: ascending by key.
        drops: samples given up.
        num_resent: times that a sample had to be drawn again (a replica died, or served other weights).
        num_stale: how many of these because weights too old, or not of this attempt, had drawn a token of it.
        seconds: from the first prompt sent to the last sample whole.
    """

    rollouts: tuple[Rollout, ...]
    drops: tuple[Drop, ...] = ()
    num_resent: int = 0
    num_stale: int = 0
    seconds: float = 0.0
