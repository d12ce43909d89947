from itertools import pairwise

import numpy as np
import pytest

from steersman.trainer.rollout.packing import pack, unpack
from steersman.trainer.rollout.types import FinishReason, Prompt, Rollout, VersionSpan, WeightVersion


def rollout(index: int, prompt_tokens: int, tokens: int, *, spans: int = 1) -> Rollout:
    generator = np.random.default_rng(index)
    borders = np.linspace(0, tokens, spans + 1).astype(int).tolist()
    return Rollout(
        prompt=Prompt(index=index, token_ids=generator.integers(0, 2**31 - 1, prompt_tokens).astype(np.int32)),
        sample=index % 3,
        response_ids=generator.integers(0, 99, tokens).astype(np.int32),
        behaviour_logprobs=generator.normal(size=tokens).astype(np.float32),
        ref_logprobs=generator.normal(size=tokens).astype(np.float32),
        weight_versions=tuple(
            VersionSpan(version=WeightVersion(run_id="demo.2", step=number), start=start, end=end)
            for number, (start, end) in enumerate(pairwise(borders))
        ),
        score=float(generator.normal()),
        finish_reason=FinishReason.STOP if index % 2 else FinishReason.LENGTH,
    )


@pytest.mark.parametrize("count", [0, 1, 5])
def test_rollouts_arrive_as_they_were_sent(count: int) -> None:
    sent = [
        rollout(index, prompt_tokens=1 + index, tokens=3 + 2 * index, spans=1 + index % 2) for index in range(count)
    ]
    received = unpack(pack(sent))
    assert len(received) == count
    for one, other in zip(received, sent, strict=True):
        assert one.key == other.key
        assert (one.score, one.finish_reason, one.weight_versions) == (
            other.score,
            other.finish_reason,
            other.weight_versions,
        )
        assert np.array_equal(one.prompt.token_ids, other.prompt.token_ids)
        assert np.array_equal(one.token_steps, other.token_steps)
        for name in ("response_ids", "behaviour_logprobs", "ref_logprobs"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_what_only_scorers_need_stays_behind() -> None:
    sent = rollout(0, 2, 3)
    with_text = Rollout(**{**sent.__dict__, "prompt": Prompt(index=0, token_ids=sent.prompt.token_ids, text="secret")})
    assert b"secret" not in pack([with_text])
