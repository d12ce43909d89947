"""From prompts to whole samples.

Invariants:

- Each sample of each prompt ends in exactly one place: once in `RolloutBatch.rollouts` with response, score
  and reference log-probs, or once in `RolloutBatch.drops` with the reason. None is lost, none is doubled,
  none gets a made-up score.
- A completion goes to reward and reference when it ends, with those that end within a tenth of a second of it, while
  its siblings are still being drawn; nothing waits once no sample is being drawn.
- A completion is kept only if each of its tokens was drawn by weights that may be trained on when its batch is
  (`VersionGate.accepts`) and the engine did not cut it off; else it is drawn again, and counted.
- A failing replica costs only the samples that it had not finished.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, cast

from steersman.client.types import Sample
from steersman.trainer.retry import Backoff, GaveUp, Sleep, Waits, is_transient
from steersman.trainer.rollout.coalesce import Coalescer
from steersman.trainer.rollout.ports import Connect, ReferencePort, RewardPort, VersionGate
from steersman.trainer.rollout.replicas import Replica, ReplicaPool
from steersman.trainer.rollout.types import (
    Completion,
    Drop,
    FinishReason,
    FloatArray,
    Prompt,
    Rollout,
    RolloutBatch,
    SamplingSettings,
    token_steps,
)
from steersman.wire.errors import SteersmanError

_log = logging.getLogger(__name__)
Key = tuple[int, int]
_OTHER_WEIGHTS: Final = "weights that may not be trained on drew it"


@dataclass(frozen=True, kw_only=True)
class CollectorSettings:
    """How a batch is collected.

    Attributes:
        sampling: how responses are drawn.
        backoff: for all services.
        max_in_flight: samples at one replica at once.
        call_items: largest call to reward and reference; call_concurrency: calls to each at once.
        item_attempts: tries of an item that reward or reference failed by itself.
        draw_attempts: draws of a sample that came back cut off or from other weights, before it is dropped.
    """

    sampling: SamplingSettings
    backoff: Backoff = field(default_factory=Backoff)
    max_in_flight: int = 256
    call_items: int = 32
    call_concurrency: int = 2
    item_attempts: int = 3
    draw_attempts: int = 20


class Collector:
    """Collects batches; several may be under way at once. Lives on one event loop; `close` ends its tasks.

    Args:
        connect: makes the port of a policy replica; the collector closes it.
        gate: see `VersionGate`.
        targets: the first replicas; see `update_targets`.
        explain_absence: why there are no targets, where there are none; may be empty.
    """

    def __init__(
        self,
        connect: Connect,
        reward: RewardPort,
        reference: ReferencePort,
        gate: VersionGate,
        *,
        settings: CollectorSettings,
        targets: Iterable[str] = (),
        waits: Waits | None = None,
        explain_absence: Callable[[], str] = str,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.waits = waits if waits is not None else Waits()
        self._settings = settings
        self._gate = gate
        self._sleep = sleep
        self._pool = ReplicaPool(
            connect,
            gate,
            targets=targets,
            backoff=settings.backoff,
            waits=self.waits,
            max_in_flight=settings.max_in_flight,
            explain_absence=explain_absence,
            sleep=sleep,
        )
        self._num_drawing = 0
        self._reward_name, self._reference_name = f"reward at {reward.target}", f"reference at {reference.target}"
        temperature = settings.sampling.temperature
        self._scores: Coalescer[Completion, float] = Coalescer(
            reward.scores,
            what=self._reward_name,
            backoff=settings.backoff,
            waits=self.waits,
            more_to_come=lambda: self._num_drawing > 0,
            max_items=settings.call_items,
            max_calls=settings.call_concurrency,
            item_attempts=settings.item_attempts,
            sleep=sleep,
        )
        self._references: Coalescer[Completion, FloatArray] = Coalescer(
            lambda completions: reference.logprobs(completions, temperature),
            what=self._reference_name,
            backoff=settings.backoff,
            waits=self.waits,
            more_to_come=lambda: self._num_drawing > 0,
            max_items=settings.call_items,
            max_calls=settings.call_concurrency,
            item_attempts=settings.item_attempts,
            sleep=sleep,
        )

    async def collect(self, prompts: Sequence[Prompt], *, oldest_step: int = 0, priority: int = 0) -> RolloutBatch:
        """All samples of `prompts`, whole or dropped, every token drawn by weights of `oldest_step` or later.

        Of several batches under way the engine serves the one with the lowest `priority` first. Raises GaveUp if a
        service stayed away for longer than the settings allow.
        """
        sampling = replace(self._settings.sampling, priority=priority)
        batch = _Ledger(prompts, sampling, oldest_step)
        started = self.waits.clock()
        self._pool.check_all()
        failed: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    group.create_task(self._draw(prompt, batch, group))
        except* GaveUp as failures:
            # One is enough: the others wait for the same service.
            failed = failures.exceptions[0]
        # Not in the handler: before Python 3.11.4 what is raised there comes out wrapped in a group.
        if failed is not None:
            raise failed
        return batch.close(self.waits.clock() - started)

    def update_targets(self, targets: Iterable[str]) -> None:
        """Makes `targets` the policy replicas, also while batches are under way.

        New ones get prompts once the gate lets them in. Those that are gone get no more; what they owe may still end
        there, and is drawn by others if it does not.
        """
        self._pool.update_targets(targets)

    async def close(self) -> None:
        """Ends everything under way."""
        await self._pool.close()
        await self._scores.close()
        await self._references.close()

    async def _draw(self, prompt: Prompt, batch: "_Ledger", group: asyncio.TaskGroup) -> None:
        """Draws the samples of one prompt; after the last prompt, what has ended waits for no more."""
        self._num_drawing += 1
        try:
            await self._draw_samples(prompt, batch, group)
        finally:
            self._num_drawing -= 1
            if not self._num_drawing:
                self._scores.hurry()
                self._references.hurry()

    async def _draw_samples(self, prompt: Prompt, batch: "_Ledger", group: asyncio.TaskGroup) -> None:
        """Draws the samples of one prompt, from as many replicas as it takes."""
        missing = list(range(batch.sampling.num_samples))
        num_unusable: Counter[int] = Counter()
        failing_since: float | None = None
        attempt = 0
        while missing:
            num_before = len(missing)
            async with self._pool.lease(len(missing)) as (replica, epoch):
                unusable: list[int] = []
                try:
                    async for slot, sample in _samples(replica, prompt, list(missing), batch.sampling):
                        if problem := self._problem(sample, batch.oldest_step):
                            _log.warning("%s: drawing a sample again: %s", replica.port.target, problem)
                            unusable.append(slot)
                            if problem is _OTHER_WEIGHTS:
                                batch.num_stale += 1
                                self._pool.failed(replica, epoch)
                            continue
                        missing.remove(slot)
                        group.create_task(self._complete(_completion(prompt, slot, sample), batch))
                except SteersmanError as error:
                    if not is_transient(error):
                        for slot in missing:
                            batch.fail((prompt.index, slot), f"policy at {replica.port.target}", error)
                        return
                    if self._pool.failed(replica, epoch):  # said once, not for every prompt that was there
                        _log.warning("policy at %s failed, what it owes is drawn again: %s", replica.port.target, error)
                    now = self.waits.clock()
                    if failing_since is None or len(missing) < num_before:
                        failing_since = now
                    if now - failing_since >= self._settings.backoff.give_up_seconds:
                        message = f"policy failed for {now - failing_since:.0f} s: {error}"
                        raise GaveUp(message) from error
            batch.num_resent += len(missing)
            num_unusable.update(unusable)
            for slot in [slot for slot in missing if num_unusable[slot] >= self._settings.draw_attempts]:
                missing.remove(slot)
                batch.drop((prompt.index, slot), "policy", f"no usable sample in {num_unusable[slot]} draws")
            if missing:
                await self._sleep(self._settings.backoff.delay(attempt))
                attempt += 1

    async def _complete(self, completion: Completion, batch: "_Ledger") -> None:
        """Has one completion scored by both services at once."""
        key = (completion.prompt.index, completion.sample)
        score, ref_logprobs = await asyncio.gather(
            self._scores.submit(completion), self._references.submit(completion), return_exceptions=True
        )
        for service, answer in ((self._reward_name, score), (self._reference_name, ref_logprobs)):
            if isinstance(answer, SteersmanError):
                batch.fail(key, service, answer)
                return
            if isinstance(answer, BaseException):
                raise answer
        score, ref_logprobs = cast(float, score), cast(FloatArray, ref_logprobs)
        if not math.isfinite(score):
            batch.drop(key, self._reward_name, f"the score is {score}, must be finite")
            return
        if len(ref_logprobs) != len(completion.response_ids):
            problem = f"{len(ref_logprobs)} log-probs came for {len(completion.response_ids)} tokens"
            batch.drop(key, self._reference_name, problem)
            return
        batch.add(
            Rollout(
                prompt=completion.prompt,
                sample=completion.sample,
                response_ids=completion.response_ids,
                behaviour_logprobs=completion.behaviour_logprobs,
                ref_logprobs=ref_logprobs,
                weight_versions=completion.weight_versions,
                score=score,
                finish_reason=completion.finish_reason,
            )
        )

    def _problem(self, sample: Sample, oldest_step: int) -> str:
        """Why a sample cannot be used and must be drawn again; empty if it can."""
        if sample.finish_reason is FinishReason.ABORTED:
            return "the engine gave it up"
        if not len(sample.token_ids) or len(sample.token_ids) != len(sample.logprobs):
            return f"{len(sample.token_ids)} tokens with {len(sample.logprobs)} log-probs"
        try:
            token_steps(sample.weight_versions, len(sample.token_ids))
        except ValueError as error:
            return str(error)
        versions = [span.version for span in sample.weight_versions]
        if not all(self._gate.accepts(version.run_id, version.step, oldest_step=oldest_step) for version in versions):
            return _OTHER_WEIGHTS
        return ""


async def _samples(
    replica: Replica, prompt: Prompt, slots: Sequence[int], sampling: SamplingSettings
) -> AsyncIterator[tuple[int, Sample]]:
    """Samples from one replica with the slot that each fills, as they end."""
    samples = replica.port.samples(prompt, replace(sampling, num_samples=len(slots)))
    try:
        async for sample in samples:
            yield slots[sample.index], sample
    finally:
        await samples.aclose()


def _completion(prompt: Prompt, slot: int, sample: Sample) -> Completion:
    return Completion(
        prompt=prompt,
        sample=slot,
        response_ids=sample.token_ids,
        behaviour_logprobs=sample.logprobs,
        weight_versions=sample.weight_versions,
        finish_reason=sample.finish_reason,
    )


class _Ledger:
    """Where each sample of a batch ended. Refuses a second entry, and a close before the last."""

    def __init__(self, prompts: Sequence[Prompt], sampling: SamplingSettings, oldest_step: int) -> None:
        self.sampling = sampling
        self.oldest_step = oldest_step
        self._open = {(prompt.index, slot) for prompt in prompts for slot in range(sampling.num_samples)}
        if len(self._open) != len(prompts) * sampling.num_samples:
            raise ValueError("prompts share an index, each must have its own")
        self._rollouts: list[Rollout] = []
        self._drops: list[Drop] = []
        self.num_resent = 0
        self.num_stale = 0

    def add(self, rollout: Rollout) -> None:
        self._open.remove(rollout.key)
        self._rollouts.append(rollout)

    def drop(self, key: Key, service: str, reason: str, cause: str = "") -> None:
        self._open.remove(key)
        self._drops.append(Drop(key=key, service=service, reason=reason, cause=cause))
        _log.warning("dropping %s", self._drops[-1])

    def fail(self, key: Key, service: str, error: SteersmanError) -> None:
        self.drop(key, service, str(error), cause=str(error.reason or error.code.name))

    def close(self, seconds: float) -> RolloutBatch:
        assert not self._open, f"samples without an end: {sorted(self._open)}"
        return RolloutBatch(
            rollouts=tuple(sorted(self._rollouts, key=lambda rollout: rollout.key)),
            drops=tuple(sorted(self._drops, key=lambda drop: drop.key)),
            num_resent=self.num_resent,
            num_stale=self.num_stale,
            seconds=seconds,
        )
