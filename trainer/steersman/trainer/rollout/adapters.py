"""The ports of a rollout over gRPC: what the clients of the SDK need to stand behind them."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from steersman.client import (
    AsyncPolicyClient,
    AsyncReferenceClient,
    AsyncRewardClient,
    Overlength,
    Sample,
    ScoreItem,
)
from steersman.client.types import IntArray
from steersman.trainer.rollout.types import Completion, FloatArray, Prompt, SamplingSettings
from steersman.wire.errors import Code, SteersmanError

_READY_SECONDS: Final = 10.0

Decode = Callable[[IntArray], str]


@dataclass(frozen=True, kw_only=True)
class GrpcPolicy:
    """A policy replica. Give the client `ChannelSettings(retry_attempts=1)`.

    A retry inside the channel would send the prompt to a replica that just restarted, before it has its
    weights.
    """

    client: AsyncPolicyClient

    @property
    def target(self) -> str:
        """Address of the replica."""
        return self.client.target

    async def ready(self) -> None:
        """By a small call on the connection that prompts take: another one may have come back before it."""
        await self.client.model(timeout=_READY_SECONDS)

    async def samples(self, prompt: Prompt, sampling: SamplingSettings) -> AsyncGenerator[Sample, None]:
        """Samples as they end, from the whole distribution: no nucleus, no top-k."""
        stream = self.client.samples(
            prompt.token_ids,
            num_samples=sampling.num_samples,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            ignore_eos=sampling.ignore_eos,
            priority=sampling.priority,
            top_p=1.0,
            top_k=0,
        )
        async with aclosing(stream) as samples:  # type: ignore[type-var]
            async for sample in samples:
                yield sample

    async def close(self) -> None:
        """Closes the client."""
        await self.client.close()


@dataclass(frozen=True, kw_only=True)
class GrpcReward:
    """The reward service. With `decode_prompt` and `decode_response` it is asked with text, else with token
    ids.
    """

    client: AsyncRewardClient
    scorer: str = ""
    overlength: Overlength = Overlength.FAIL
    decode_prompt: Decode | None = None
    decode_response: Decode | None = None

    @property
    def target(self) -> str:
        """Address of the service."""
        return self.client.target

    async def scores(self, completions: Sequence[Completion]) -> Sequence[float | SteersmanError]:
        """One score or error for each completion."""
        items = [self._item(completion) for completion in completions]
        scores = await self.client.score(items, scorer=self.scorer, overlength=self.overlength)
        return [_value(score.value, score.error) for score in scores]

    def _item(self, completion: Completion) -> ScoreItem:
        prompt, response = completion.prompt, completion.response_ids
        if self.decode_prompt is None or self.decode_response is None:
            return ScoreItem(prompt=prompt.token_ids, response=response, context=prompt.context)
        text = prompt.text or self.decode_prompt(prompt.token_ids)
        return ScoreItem(prompt=text, response=self.decode_response(response), context=prompt.context)


def _value(value: float | None, error: SteersmanError | None) -> float | SteersmanError:
    if error is not None:
        return error
    return SteersmanError(None, "an item has neither score nor error", code=Code.DATA_LOSS) if value is None else value


@dataclass(frozen=True, kw_only=True)
class GrpcReference:
    """The reference service."""

    client: AsyncReferenceClient

    @property
    def target(self) -> str:
        """Address of the service."""
        return self.client.target

    async def logprobs(
        self, completions: Sequence[Completion], temperature: float
    ) -> Sequence[FloatArray | SteersmanError]:
        """Log-probs of the response tokens of each completion."""
        sequences = [
            [*completion.prompt.token_ids.tolist(), *completion.response_ids.tolist()] for completion in completions
        ]
        lengths = [len(completion.prompt.token_ids) for completion in completions]
        return (await self.client.logprobs(sequences, lengths, temperature=temperature)).logprobs
