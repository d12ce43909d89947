"""How long generation stands still when the weights change: real vLLM, 64 requests, and pushes while they run.

Every request streams its tokens. A decode step is the median time between successive tokens of a request in the same
run, over all requests and the whole of it. The figure is the worst pause that the server reports, from before the
engine is told to pause until it has been told to go on, in such steps; beside it stands the longest time that any
request waited for its next message, which holds what staging takes between steps, and recomputed caches, as well.

A run counts only if no request was disturbed: each ends with all its tokens, and went through every version in order.
"""

import asyncio
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from benchmarks import toymodel
from benchmarks.context import Context, Measured
from benchmarks.figures import spread
from benchmarks.stack import CORES, Service, running, thread_environment
from steersman.client import AsyncPolicyClient, AsyncWeightClient
from steersman.client.types import Activation, FinishReason, KvCachePolicy, SampleDelta
from steersman.trainer.weights.image import WeightImage
from steersman.wire.identity import WeightVersion

NUM_REQUESTS = 64
RESPONSE_TOKENS = 1536
NUM_PUSHES = 6
_QUICK_TOKENS = 256
_QUICK_PUSHES = 2
_DEADLINE_S = 500.0
# All are past their prompts, and their steps are steady.
_WARM_TOKENS = 16


@dataclass
class Timeline:
    """What came of one request, and when (seconds on one clock)."""

    deltas: list[SampleDelta] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, delta: SampleDelta, now: float) -> None:
        """The next message."""
        self.deltas.append(delta)
        self.times.append(now)

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return sum(len(delta.token_ids) for delta in self.deltas)

    def seconds_per_token(self) -> list[float]:
        """Time between successive tokens; a message of several tokens gives their mean, once for each."""
        steps: list[float] = []
        for before, now, delta in zip(self.times, self.times[1:], self.deltas[1:], strict=False):
            count = len(delta.token_ids)
            steps += [(now - before) / count] * count
        return steps

    def longest_wait(self) -> float:
        """Seconds between two messages, prompts and first tokens left out."""
        waits = zip(self.times, self.times[1:], strict=False)
        return max(after - before for before, after in list(waits)[_WARM_TOKENS:])

    def check(self, steps: Sequence[int], num_tokens: int) -> None:
        """RuntimeError unless all tokens came, ran to the limit, and are of the versions `steps` in turn."""
        at = 0
        seen: list[int] = []
        for span in (span for delta in self.deltas for span in delta.weight_versions):
            if span.start != at or span.end <= span.start:
                raise RuntimeError(f"version span [{span.start}, {span.end}) does not begin at token {at}")
            at = span.end
            if not seen or seen[-1] != span.version.step:
                seen.append(span.version.step)
        reason = self.deltas[-1].finish_reason
        if (at, self.num_tokens, reason) != (num_tokens, num_tokens, FinishReason.LENGTH):
            raise RuntimeError(f"{self.num_tokens} tokens, versions of {at}, ended by {reason}; expected {num_tokens}")
        if seen != list(steps):
            raise RuntimeError(f"tokens of the versions {seen}, expected {list(steps)}")


def run(context: Context) -> Measured:
    """Measures `activation_pause_decode_steps`."""
    num_tokens, num_pushes = (_QUICK_TOKENS, _QUICK_PUSHES) if context.quick else (RESPONSE_TOKENS, NUM_PUSHES)
    limit = toymodel.PROMPT_TOKENS + num_tokens
    policy = toymodel.build_policy(seed=0, mean_tokens=None, limit=_WARM_TOKENS, max_positions=limit)
    model = toymodel.save(policy, context.directory / "model")
    detail: dict[str, Any] = {"requests": NUM_REQUESTS, "tokens": num_tokens, "pushes": num_pushes}
    for kv_cache in (KvCachePolicy.KEEP, KvCachePolicy.RECOMPUTE):
        found = _one_server(context.directory / kv_cache.value, model, policy, kv_cache, num_tokens, num_pushes)
        detail[kv_cache.value] = found
    return Measured(
        figures={"activation_pause_decode_steps": detail[KvCachePolicy.KEEP.value]["pause_decode_steps"]["worst"]},
        detail=detail,
    )


def _one_server(
    directory: Path, model: Path, policy: Qwen2ForCausalLM, kv_cache: KvCachePolicy, num_tokens: int, num_pushes: int
) -> dict[str, Any]:
    settings = {"model": str(model), "dtype": "float32", "kv_cache_mib": 1024, "max_num_seqs": NUM_REQUESTS}
    service = Service(name="policy", settings=settings, environment=thread_environment(CORES))
    with running([service], directory) as stack:
        timelines, activations = asyncio.run(
            _push_under_load(stack.addresses["policy"], policy, kv_cache, num_tokens, num_pushes)
        )
    steps = list(range(num_pushes + 1))
    for timeline in timelines:
        timeline.check(steps, num_tokens)
    if any(activation.num_running_requests != NUM_REQUESTS for activation in activations):
        raise RuntimeError(f"not all {NUM_REQUESTS} requests were running at every activation: {activations}")
    step_s = median(value for timeline in timelines for value in timeline.seconds_per_token())
    longest_s = max(timeline.longest_wait() for timeline in timelines)
    pauses = [activation.pause_seconds for activation in activations]
    return {
        "pause_decode_steps": {"worst": max(pauses) / step_s, "median": median(pauses) / step_s},
        "decode_step_seconds": step_s,
        "pause_seconds": asdict(spread(pauses)),
        "longest_wait_seconds": longest_s,
        "longest_wait_decode_steps": longest_s / step_s,
        "tokens_per_message": median(len(delta.token_ids) for each in timelines for delta in each.deltas),
        "tokens_by_version": _tokens_by_version(timelines),
    }


def _tokens_by_version(timelines: Sequence[Timeline]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for timeline in timelines:
        for delta in timeline.deltas:
            for span in delta.weight_versions:
                counts[span.version.step] = counts.get(span.version.step, 0) + span.end - span.start
    return counts


async def _push_under_load(
    address: str, policy: Qwen2ForCausalLM, kv_cache: KvCachePolicy, num_tokens: int, num_pushes: int
) -> tuple[list[Timeline], list[Activation]]:
    prompts = toymodel.encode(toymodel.build_prompts(NUM_REQUESTS, toymodel.PROMPT_TOKENS, seed=3))
    timelines = [Timeline() for _ in prompts]
    warm = asyncio.Event()

    async def follow(client: AsyncPolicyClient, prompt: list[int], timeline: Timeline) -> None:
        async for delta in client.stream(prompt, max_tokens=num_tokens, ignore_eos=True, temperature=1.0):
            timeline.add(delta, time.perf_counter())
            if not warm.is_set() and all(each.num_tokens >= _WARM_TOKENS for each in timelines):
                warm.set()

    images = [_changed(policy, step) for step in range(1, num_pushes + 1)]
    async with (
        asyncio.timeout(_DEADLINE_S),
        AsyncPolicyClient(address) as client,
        AsyncWeightClient(address) as weights,
        asyncio.TaskGroup() as group,
    ):
        for prompt, timeline in zip(prompts, timelines, strict=True):
            group.create_task(follow(client, prompt, timeline))
        await warm.wait()
        activations = [await _push(weights, image, kv_cache) for image in images]
    return timelines, activations


def _changed(policy: Qwen2ForCausalLM, step: int) -> WeightImage:
    """The weights after an imagined step, a little different everywhere."""
    torch.manual_seed(step)
    model = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    return WeightImage.of(model, WeightVersion(run_id="bench", step=step))


async def _push(client: AsyncWeightClient, image: WeightImage, kv_cache: KvCachePolicy) -> Activation:
    manifest = (await client.state(include_manifest=True)).manifest
    push = await client.begin(image.version, manifest)
    await client.push(push.push_id, image.chunks(manifest, max_bytes=push.max_chunk_bytes))
    await client.stage(push.push_id, image.digest(manifest))
    return await client.activate(image.version, kv_cache=kv_cache)
