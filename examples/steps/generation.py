"""Answers from the policy service, as token ids and text."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from steersman.client import AsyncPolicyClient, AsyncReferenceClient, FinishReason, WeightVersion

MAX_CONCURRENT: Final = 64


class Tokenizer:
    """The pipeline's view of a saved tokenizer."""

    def __init__(self, directory: Path, *, max_prompt_tokens: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self._max_prompt_tokens = max_prompt_tokens

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids; a prompt that is too long loses its oldest ones, as in training."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[-self._max_prompt_tokens :]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without end-of-sequence and padding."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. `logprob` is the sum over its tokens under the weights that drew it, `version` the last of these."""

    prompt: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    ended: bool
    logprob: float
    version: WeightVersion


async def answer_all(
    address: str,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    samples_per_prompt: int = 1,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[Answer]]:
    """Answers to each prompt, in order. SteersmanError if a call fails."""
    room = asyncio.Semaphore(MAX_CONCURRENT)
    async with AsyncPolicyClient(address) as policy:

        async def one(index: int, prompt: str) -> list[Answer]:
            prompt_ids = tokenizer.encode_prompt(prompt)
            async with room:
                samples = await policy.generate(
                    prompt_ids,
                    num_samples=samples_per_prompt,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=seed + index,
                )
            return [
                Answer(
                    prompt=prompt,
                    prompt_ids=prompt_ids,
                    token_ids=sample.token_ids.tolist(),
                    text=tokenizer.decode(sample.token_ids.tolist()),
                    ended=sample.finish_reason is FinishReason.STOP,
                    logprob=float(sample.logprobs.sum()),
                    version=sample.weight_versions[-1].version,
                )
                for sample in samples
            ]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
        except ExceptionGroup as failures:
            # One failed call ends the others; it alone is worth telling.
            raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def divergences(address: str, answers: Sequence[Answer], *, temperature: float) -> list[float]:
    """log pi(answer) - log reference(answer) of each answer, in nats: their mean estimates the KL of a sequence."""
    async with AsyncReferenceClient(address) as reference:
        result = await reference.logprobs(
            [answer.prompt_ids + answer.token_ids for answer in answers],
            [len(answer.prompt_ids) for answer in answers],
            temperature=temperature,
        )
    pairs = zip(answers, result.logprobs, strict=True)
    return [answer.logprob - float(logprobs.sum()) for answer, logprobs in pairs]
