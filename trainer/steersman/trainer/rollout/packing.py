"""Rollouts as bytes, for ranks that train on what another has drawn. Exact, and not pickled.

    8 bytes         length of the header, little-endian
    header          JSON: of each rollout its key, lengths, score, finish reason and weight versions
    int32           prompt tokens of all rollouts, then response tokens of all
    float32         behaviour log-probs of all response tokens, then those under the reference

What only scorers and the sample log need, a prompt's text and context, stays behind.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.client.types import FinishReason
from steersman.trainer.rollout.types import Prompt, Rollout
from steersman.wire.identity import VersionSpan, WeightVersion

_LENGTH_BYTES = 8


def pack(rollouts: Sequence[Rollout]) -> bytes:
    """All of `rollouts` that an update needs."""
    header = json.dumps([_facts(rollout) for rollout in rollouts]).encode()
    arrays = [
        *(np.asarray(rollout.prompt.token_ids, "<i4") for rollout in rollouts),
        *(np.asarray(rollout.response_ids, "<i4") for rollout in rollouts),
        *(np.asarray(rollout.behaviour_logprobs, "<f4") for rollout in rollouts),
        *(np.asarray(rollout.ref_logprobs, "<f4") for rollout in rollouts),
    ]
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *(array.tobytes() for array in arrays)])


def unpack(data: bytes) -> list[Rollout]:
    """What `pack` was given, in its order."""
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    facts: list[dict[str, Any]] = json.loads(data[_LENGTH_BYTES:start])
    prompt_lengths, lengths = [one["prompt_tokens"] for one in facts], [one["tokens"] for one in facts]
    numbers = np.frombuffer(data, "<i4", offset=start)
    prompts, responses, behaviour, reference = _parts(
        numbers, [sum(prompt_lengths), sum(lengths), sum(lengths), sum(lengths)]
    )
    rows = zip(
        facts,
        _parts(prompts, prompt_lengths),
        _parts(responses, lengths),
        _parts(behaviour.view("<f4"), lengths),
        _parts(reference.view("<f4"), lengths),
        strict=True,
    )
    return [
        Rollout(
            prompt=Prompt(index=one["index"], token_ids=prompt_ids),
            sample=one["sample"],
            response_ids=response_ids,
            behaviour_logprobs=behaviour_logprobs,
            ref_logprobs=ref_logprobs,
            weight_versions=tuple(_span(*span) for span in one["weight_versions"]),
            score=one["score"],
            finish_reason=FinishReason(one["finish_reason"]),
        )
        for one, prompt_ids, response_ids, behaviour_logprobs, ref_logprobs in rows
    ]


def _facts(rollout: Rollout) -> dict[str, Any]:
    return {
        "index": rollout.prompt.index,
        "sample": rollout.sample,
        "prompt_tokens": len(rollout.prompt.token_ids),
        "tokens": len(rollout.response_ids),
        "score": float(rollout.score),
        "finish_reason": rollout.finish_reason.value,
        "weight_versions": [
            [span.version.run_id, span.version.step, span.start, span.end] for span in rollout.weight_versions
        ],
    }


def _span(run_id: str, step: int, start: int, end: int) -> VersionSpan:
    return VersionSpan(version=WeightVersion(run_id=run_id, step=step), start=start, end=end)


def _parts(numbers: NDArray[Any], lengths: Sequence[int]) -> Iterator[NDArray[Any]]:
    ends = accumulate(lengths, initial=0)
    return (numbers[start:end] for start, end in pairwise(ends))
