"""Drives real vLLM engines and prints what happened as JSON: `engine_program.py FOLDER_A FOLDER_B`.

A process of its own, because engines are forked and a process that has run torch on several threads must not fork.
"""

import asyncio
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from steersman.policy.engine.options import EngineOptions, prepare_environment
from steersman.policy.engine.port import (
    GenerationRequest,
    HostWeights,
    KvCachePolicy,
    TensorSlot,
    WeightLoadError,
)
from steersman.policy.weights.checkpoint import Checkpoint
from steersman.policy.weights.memory import HostCopy
from steersman.wire.identity import WeightVersion

PROMPTS = [list(range(5, 12)), list(range(40, 80)), [9]]
B = WeightVersion(run_id="run", step=1)
DEADLINE_S = 150


def options(folder: Path) -> EngineOptions:
    return EngineOptions(model=folder, kv_cache_bytes=2**25, max_num_seqs=8, num_threads=1, load_chunk_bytes=2**16)


async def collect(engine: Any, request_id: str, **fields: Any) -> dict[str, Any]:
    """One sample: tokens, log-probs, runs of versions, finish reason."""
    found: dict[str, Any] = {"tokens": [], "logprobs": [], "versions": [], "finish": None}
    async for delta in engine.generate(GenerationRequest(request_id=request_id, **fields)):
        found["tokens"] += list(delta.token_ids)
        found["logprobs"] += list(delta.logprobs)
        for span in delta.versions:
            runs = found["versions"]
            if runs and runs[-1][0] == str(span.version) and runs[-1][2] == span.start:
                runs[-1][2] = span.end
            else:
                runs.append([str(span.version), span.start, span.end])
        found["finish"] = delta.finish_reason
    return found


async def probe(engine: Any, name: str) -> list[Any]:
    """What the weights make of some prompts, bit for bit."""
    answers = []
    for index, prompt in enumerate(PROMPTS):
        for temperature in (0.0, 1.0):
            answer = await collect(
                engine,
                f"{name}-{index}-{temperature}",
                prompt_token_ids=prompt,
                max_tokens=24,
                temperature=temperature,
                seed=17,
                ignore_eos=True,
            )
            answers.append([answer["tokens"], answer["logprobs"]])
    return answers


def without_first(weights: HostWeights) -> HostWeights:
    return dataclasses.replace(weights, slots=weights.slots[1:])


def change_first(weights: HostWeights, **changes: Any) -> HostWeights:
    first, *rest = weights.slots
    return dataclasses.replace(weights, slots=(dataclasses.replace(first, **changes), *rest))


def transposed(slot: TensorSlot) -> tuple[int, ...]:
    return (*slot.shape, 1) if len(slot.shape) == 1 else tuple(reversed(slot.shape))


async def refusals(engine: Any, weights: HostWeights) -> dict[str, bool]:
    """Whether the engine refuses weights that do not fit."""
    bad = {
        "missing": without_first(weights),
        "unknown": change_first(weights, name="model.layers.0.no_such.weight"),
        "shape": change_first(weights, shape=transposed(weights.slots[0])),
    }
    found = {}
    for name, candidate in bad.items():
        try:
            await engine.stage(candidate)
        except WeightLoadError:
            found[name] = True
        else:
            found[name] = False
            await engine.discard_staged()
    await engine.stage(weights)
    await engine.discard_staged()
    try:
        await engine.activate(B, weights, KvCachePolicy.KEEP)
    except WeightLoadError:
        found["discarded"] = True
    return found


async def live_switch(engine: Any, weights: HostWeights) -> dict[str, Any]:
    """Switches while requests run, half of them streamed."""
    running = [
        asyncio.create_task(
            collect(
                engine,
                f"live-{index}",
                prompt_token_ids=PROMPTS[index % 3],
                max_tokens=400,
                ignore_eos=True,
                final_only=index % 2 == 0,
            )
        )
        for index in range(6)
    ]
    await collect(engine, "warm", prompt_token_ids=[5], max_tokens=8, ignore_eos=True)
    await engine.stage(weights)
    switch = await engine.activate(B, weights, KvCachePolicy.KEEP)
    return {"num_running": switch.num_running_requests, "samples": await asyncio.gather(*running)}


async def abort(engine: Any) -> dict[str, bool]:
    """Whether a cancelled request gives its cache blocks back. The scheduler is paused: nothing ends by itself."""
    core = engine._llm.engine_core
    started = asyncio.Event()

    async def read() -> None:
        request = GenerationRequest(
            request_id="abort", prompt_token_ids=PROMPTS[0], max_tokens=400, num_samples=2, ignore_eos=True
        )
        async with contextlib.aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                started.set()

    reader = asyncio.create_task(read())
    await started.wait()
    await core.pause_scheduler_async(mode="keep", clear_cache=False)
    held = not await engine._llm.reset_prefix_cache()
    reader.cancel()
    await asyncio.wait([reader])
    freed = False
    while not freed:
        freed = await engine._llm.reset_prefix_cache()
    await core.resume_scheduler_async()
    return {"held": held, "freed": freed, "none_unfinished": engine.num_unfinished == 0}


async def drive(engine: Any, other: Any, weights: HostWeights) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        await engine.prepare()
        await other.prepare()
        report: dict[str, Any] = {"fresh_a": await probe(engine, "a"), "fresh_b": await probe(other, "b")}
        report["refused"] = await refusals(engine, weights)
        report["after_refusals"] = await probe(engine, "a2")
        report["live"] = await live_switch(engine, weights)
        report["switched"] = await probe(engine, "b2")
        await engine.rollback(WeightVersion(), weights, KvCachePolicy.RECOMPUTE)
        report["rolled_back"] = await probe(engine, "a3")
        await engine.stage(weights)
        await engine.activate(B, weights, KvCachePolicy.KEEP)
        report["switched_again"] = await probe(engine, "b3")
        report["abort"] = await abort(engine)
        report["after_abort"] = await probe(engine, "b4")
        await other.shutdown()
        await engine.shutdown()
        return report


def main() -> None:
    folder_a, folder_b = map(Path, sys.argv[1:])
    prepare_environment(options(folder_a), on_cpu=True)
    from steersman.policy.engine.vllm_engine import start_engine

    engine, other = start_engine(options(folder_a)), start_engine(options(folder_b))
    checkpoint = Checkpoint(folder_b)
    copy = HostCopy(checkpoint.manifest)
    checkpoint.read_into(copy.bytes)
    sys.stdout.write(json.dumps(asyncio.run(drive(engine, other, copy.weights))))


if __name__ == "__main__":
    main()
