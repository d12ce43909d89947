"""Services that answer at once, fail when told to, and write down what happened."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from steersman.client.types import FinishReason, Sample
from steersman.trainer.rollout.types import Completion, FloatArray, Prompt, SamplingSettings
from steersman.wire.errors import Code, Reason, SteersmanError, unavailable
from steersman.wire.identity import VersionSpan, WeightVersion

RUN = "demo.1"


async def no_sleep(_: float) -> None:
    """Lets everybody else run, and takes no time."""
    await asyncio.sleep(0)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index=index, token_ids=np.array([10 + index, 3], np.int32)) for index in range(count)]


def sample(index: int, *, step: int = 0, run_id: str = RUN, finish: FinishReason = FinishReason.STOP) -> Sample:
    tokens = np.array([5, 6, 2], np.int32)
    span = VersionSpan(version=WeightVersion(run_id=run_id, step=step), start=0, end=3)
    return Sample(
        index=index,
        token_ids=tokens,
        logprobs=np.full(3, -1.0, np.float32),
        weight_versions=(span,),
        finish_reason=finish,
    )


@dataclass
class FakePolicy:
    """Draws what `script` says for each call: samples and errors in order; without a script, all samples asked for."""

    target: str = "policy-0"
    events: list[str] = field(default_factory=list)
    script: list[Callable[[int], list[Sample | SteersmanError]]] = field(default_factory=list)
    dead: bool = False
    step: int = 0

    async def ready(self) -> None:
        """Whatever happens to prompts."""

    async def samples(self, prompt: Prompt, sampling: SamplingSettings) -> AsyncGenerator[Sample, None]:
        self.events.append(f"{self.target} prompt {prompt.index} x{sampling.num_samples}")
        await asyncio.sleep(0)
        if self.dead:
            raise unavailable(f"{self.target} is dead")
        answers: list[Sample | SteersmanError]
        if self.script:
            answers = self.script.pop(0)(sampling.num_samples)
        else:
            answers = [sample(index, step=self.step) for index in range(sampling.num_samples)]
        for answer in answers:
            if isinstance(answer, SteersmanError):
                raise answer
            self.events.append(f"{self.target} ended {prompt.index}.{answer.index}")
            yield answer
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.events.append(f"{self.target} closed")


@dataclass
class FakeGate:
    """Lets a replica in when `alive` says so; notes each look."""

    alive: Callable[[int], bool] = lambda _: True
    repair: Callable[[int], None] = lambda _: None
    events: list[str] = field(default_factory=list)
    newest: int = 0

    async def ensure_current(self, target: str) -> None:
        await asyncio.sleep(0)
        replica = int(target.rpartition("-")[2])
        if not self.alive(replica):
            raise unavailable(f"replica {replica} is dead")
        self.repair(replica)
        self.events.append(f"policy-{replica} current")

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        return run_id == RUN and oldest_step <= step <= self.newest


@dataclass
class FakeReward:
    """Scores a completion by ten times its prompt plus its sample, unless a failure is laid up for it."""

    target: str = "reward-0"
    events: list[str] = field(default_factory=list)
    call_failures: list[SteersmanError] = field(default_factory=list)
    item_failures: dict[tuple[int, int], list[SteersmanError]] = field(default_factory=dict)
    num_scored: dict[tuple[int, int], int] = field(default_factory=dict)

    async def scores(self, completions: Sequence[Completion]) -> Sequence[float | SteersmanError]:
        await asyncio.sleep(0)
        if self.call_failures:
            raise self.call_failures.pop(0)
        answers: list[float | SteersmanError] = []
        for completion in completions:
            key = completion.prompt.index, completion.sample
            self.events.append(f"score {key[0]}.{key[1]}")
            if self.item_failures.get(key):
                answers.append(self.item_failures[key].pop(0))
            else:
                self.num_scored[key] = self.num_scored.get(key, 0) + 1
                answers.append(10.0 * key[0] + key[1])
        return answers


@dataclass
class FakeReference:
    """Log-probs of -2; a call that holds a prompt of `poisoned` fails as a whole."""

    target: str = "reference-0"
    events: list[str] = field(default_factory=list)
    call_failures: list[SteersmanError] = field(default_factory=list)
    poisoned: set[int] = field(default_factory=set)

    async def logprobs(
        self, completions: Sequence[Completion], temperature: float
    ) -> Sequence[FloatArray | SteersmanError]:
        await asyncio.sleep(0)
        if self.call_failures:
            raise self.call_failures.pop(0)
        if any(completion.prompt.index in self.poisoned for completion in completions):
            raise SteersmanError(Reason.NOT_FINITE, "a log-prob is NaN")
        self.events.extend(f"reference {c.prompt.index}.{c.sample}" for c in completions)
        return [np.full(len(completion.response_ids), -2.0, np.float32) for completion in completions]


def broken() -> SteersmanError:
    """A connection that broke in the middle."""
    return SteersmanError(None, "Socket closed", code=Code.UNAVAILABLE)
