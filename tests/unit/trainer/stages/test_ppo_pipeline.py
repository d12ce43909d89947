"""Batches begin as early as staleness allows, each once and in order, and hold no token that is too old."""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.client.types import Sample
from steersman.trainer.rollout.collector import Collector, CollectorSettings
from steersman.trainer.rollout.types import (
    Completion,
    FinishReason,
    Prompt,
    Rollout,
    RolloutBatch,
    SamplingSettings,
    VersionSpan,
    WeightVersion,
)
from steersman.trainer.stages.ppo_pipeline import RolloutPipeline, require_fresh
from steersman.wire.errors import unavailable

RUN = "demo.2"


def pipeline(begun: list[tuple[int, int]], futures: list[Future], **settings: int) -> RolloutPipeline:
    def begin(step: int, oldest_step: int) -> Future:
        begun.append((step, oldest_step))
        futures.append(Future())
        return futures[-1]

    return RolloutPipeline(begin, **settings)


@given(data=st.data())
def test_each_batch_is_begun_once_its_weights_are_published_and_taken_once_in_order(data: st.DataObject) -> None:
    staleness, total = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 12))
    first = data.draw(st.integers(0, total))
    begun: list[tuple[int, int]] = []
    futures: list[Future] = []
    made = pipeline(begun, futures, first_step=first, total_steps=total, max_staleness=staleness)
    for step in range(first, total):
        made.published(step)
        if data.draw(st.booleans()):
            made.published(step)  # said twice, it begins nothing twice
        # As early as the bound allows, no earlier: the last one begun is the last that these weights may draw.
        assert [number for number, _ in begun] == list(range(first, min(step + staleness + 1, total)))
        num_taken = step - first
        assert len(futures) - num_taken <= staleness + 1
        for future in data.draw(st.permutations(futures)):  # complete in any order
            if not future.done() and data.draw(st.booleans()):
                future.set_result(RolloutBatch(rollouts=()))
        assert made.num_ready == sum(future.done() for future in futures[num_taken:])
        assert made.take() is futures[num_taken]
    made.published(total)
    assert begun == [(step, max(step - staleness, 0)) for step in range(first, total)]


def test_nothing_is_left_under_way() -> None:
    futures: list[Future] = []
    with pipeline([], futures, first_step=0, total_steps=9, max_staleness=3) as made:
        made.published(0)
        taken = made.take()
    assert not taken.cancelled()  # it is not the pipeline's any more
    assert len(futures) == 4
    assert all(future.cancelled() for future in futures[1:])


def test_a_batch_cannot_be_taken_before_its_weights_are_published() -> None:
    made = pipeline([], [], first_step=2, total_steps=9, max_staleness=0)
    made.published(2)
    made.take()
    with pytest.raises(AssertionError, match="batch 3 was not begun"):
        made.take()


@pytest.mark.parametrize(
    ("version", "fresh"),
    [
        ((RUN, 3), True),
        ((RUN, 5), True),
        ((RUN, 2), False),
        ((RUN, 6), False),
        (("demo.1", 4), False),
        (("", 4), False),
    ],
)
def test_a_batch_with_a_token_out_of_bounds_is_refused(version: tuple[str, int], fresh: bool) -> None:
    spans = (
        VersionSpan(version=WeightVersion(run_id=RUN, step=5), start=0, end=1),
        VersionSpan(version=WeightVersion(run_id=version[0], step=version[1]), start=1, end=2),
    )
    rollout = Rollout(
        prompt=Prompt(index=7, token_ids=np.ones(1, np.int32)),
        sample=0,
        response_ids=np.ones(2, np.int32),
        behaviour_logprobs=np.zeros(2, np.float32),
        ref_logprobs=np.zeros(2, np.float32),
        weight_versions=spans,
        score=0.0,
        finish_reason=FinishReason.STOP,
    )
    batch = RolloutBatch(rollouts=(rollout,))
    if fresh:
        require_fresh(batch, run_id=RUN, oldest_step=3, step=5)
    else:
        with pytest.raises(RuntimeError, match=r"sample 7\.0 of step 5 holds tokens of weights"):
            require_fresh(batch, run_id=RUN, oldest_step=3, step=5)


@dataclass
class World:
    """Replicas that lag behind, break off or restart unseen with other weights; and the gate before them."""

    random: random.Random
    num_replicas: int
    wanted: int = 0
    versions: dict[str, WeightVersion] = field(default_factory=dict)
    num_too_old: int = 0

    def __post_init__(self) -> None:
        # An earlier attempt was further on: its step says nothing.
        self.versions = {f"p:{n}": WeightVersion(run_id="demo.1", step=9) for n in range(self.num_replicas)}

    def publish(self, step: int) -> None:
        self.wanted = step
        for target in self.versions:
            if self.random.random() < 0.7:  # else this one stays behind
                self.versions[target] = WeightVersion(run_id=RUN, step=step)

    async def ensure_current(self, target: str) -> None:
        await asyncio.sleep(0)
        self.versions[target] = WeightVersion(run_id=RUN, step=self.wanted)

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        accepted = run_id == RUN and oldest_step <= step <= self.wanted
        self.num_too_old += not accepted
        return accepted

    def maybe_restart(self, target: str) -> None:
        if self.random.random() < 0.05:
            rolled_back = WeightVersion(run_id=RUN, step=self.random.randint(0, self.wanted))
            self.versions[target] = self.random.choice([WeightVersion(), rolled_back])
            if self.random.random() < 0.5:
                raise unavailable(f"{target} restarts")


@dataclass(frozen=True)
class Policy:
    """A replica that draws token by token and stamps each with what it serves just then."""

    target: str
    world: World

    async def ready(self) -> None:
        """Always."""

    async def samples(self, prompt: Prompt, sampling: SamplingSettings) -> AsyncGenerator[Sample, None]:
        for index in range(sampling.num_samples):
            versions = []
            for _ in range(3):
                await asyncio.sleep(0)
                self.world.maybe_restart(self.target)
                versions.append(self.world.versions[self.target])
            yield Sample(
                index=index,
                token_ids=np.ones(3, np.int32),
                logprobs=np.zeros(3, np.float32),
                weight_versions=tuple(
                    VersionSpan(version=version, start=at, end=at + 1) for at, version in enumerate(versions)
                ),
                finish_reason=FinishReason.STOP,
            )

    async def close(self) -> None:
        """Nothing to close."""


class Scorer:
    target = "s:1"

    async def scores(self, completions: Sequence[Completion]) -> list[float]:
        return [1.0] * len(completions)

    async def logprobs(self, completions: Sequence[Completion], temperature: float) -> list[np.ndarray]:
        return [np.zeros(3, np.float32) for _ in completions]


async def train(world: World, *, staleness: int, first: int, total: int) -> None:
    collector = Collector(
        lambda target: Policy(target, world),
        Scorer(),
        Scorer(),
        world,
        targets=world.versions,
        settings=CollectorSettings(sampling=SamplingSettings(num_samples=2), max_in_flight=4, draw_attempts=10_000),
        sleep=lambda _: asyncio.sleep(0),
    )

    def begin(step: int, oldest_step: int) -> "asyncio.Task[RolloutBatch]":
        prompts = [Prompt(index=index, token_ids=np.array([step + 1], np.int32)) for index in range(2)]
        return asyncio.create_task(collector.collect(prompts, oldest_step=oldest_step, priority=step))

    num_stale = 0
    with RolloutPipeline(begin, first_step=first, total_steps=total, max_staleness=staleness) as made:
        for step in range(first, total):
            world.publish(step)
            made.published(step)
            batch = await asyncio.wait_for(made.take(), 20)
            # Of this step and no other, whole, nothing twice, and nothing in it that is too old.
            assert [rollout.key for rollout in batch.rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
            assert {rollout.prompt.token_ids.item() for rollout in batch.rollouts} == {step + 1}
            for rollout in batch.rollouts:
                assert {span.version.run_id for span in rollout.weight_versions} == {RUN}
                assert rollout.token_steps.min() >= step - staleness
                assert rollout.token_steps.max() <= step
            require_fresh(batch, run_id=RUN, oldest_step=made.oldest_step(step), step=step)
            num_stale += batch.num_stale
            for _ in range(world.random.randrange(30)):  # the update
                await asyncio.sleep(0)
    assert num_stale == world.num_too_old
    await collector.close()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_replicas=st.integers(1, 3),
    staleness=st.integers(0, 3),
    first=st.integers(0, 3),
    num_steps=st.integers(1, 5),
)
def test_whatever_replicas_do_no_token_is_too_old_and_no_sample_lost_or_doubled(
    seed: int, num_replicas: int, staleness: int, first: int, num_steps: int
) -> None:
    world = World(random.Random(seed), num_replicas)
    asyncio.run(train(world, staleness=staleness, first=first, total=first + num_steps))
