"""The reward service beside an oracle, vLLM's /classify and a one-sample server; its latency and its overhead.

One model, one machine, the same items for both sides of every pair. The sides score in turn, A B A B, and a figure is
the median of the ratios of neighbours. Every round has fresh token ids. Over the network the clock starts before the
client encodes its requests and stops after it decoded the last score; client and server share the machine.

Where the processor time goes is read from the kernel, thread by thread: the batcher's worker and the OpenMP threads
that it started compute the model, all others of the process are gRPC, conversion and the rest. What the worker does
between two batches is queueing, and counted with the others.
"""

import asyncio
import random
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.context import Context, Measured
from benchmarks.figures import paired_ratio, spread
from benchmarks.reward_load import Item, describe, draw_items, save_model
from benchmarks.reward_oracle import oracle_process
from benchmarks.reward_rivals import Grpc, Http, single_server, vllm_server
from benchmarks.stack import CORES, Service, running, thread_environment
from steersman.cli.supervisor import free_port
from steersman.client import Priority
from steersman.serving.threads import default_calls

Side = Callable[[int], Awaitable[tuple[float, list[float]]]]
"""Scores the items of a seed; returns the seconds that it took, and the scores in the order of the items."""

BULK_CALLERS = 4
BULK_PROMPTS_PER_REQUEST = 4
MODEL_THREADS = "batcher-reward"
NUM_WORKERS = default_calls("cpu", CORES)
# Scores of the two sides of a pair may differ by bfloat16's rounding; they have a standard deviation of about 1.
TOLERANCE = 0.25


def run(context: Context) -> Measured:
    """Measures the five figures of the reward server."""
    return asyncio.run(_Run(context).measure())


class _Run:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._quick = context.quick
        self._seed = 0
        self._num_prompts = 2 if context.quick else 16
        self._detail: dict[str, Any] = {}

    async def measure(self) -> Measured:
        directory = self._context.directory
        model = save_model(directory / "model", quick=self._quick)
        self._detail["load"] = describe(self.draw(self._num_prompts))
        metrics_port = free_port()
        service = Service(
            name="reward",
            settings={
                "scorers": {"reward": {"model": str(model)}},
                "num_threads": CORES,
                "metrics_port": metrics_port,
            },
            environment=thread_environment(CORES),
        )
        with ExitStack() as stack:
            reward = stack.enter_context(running([service], directory))
            grpc = Grpc(reward.addresses["reward"])
            figures = await self._against_oracles(grpc, model)
            with single_server(model, directory) as url:
                figures["score_vs_single"] = await self._against_http("single", grpc, url, items_per_request=1)
            figures |= await _Latency(self, grpc, reward.pids["reward"], metrics_port).measure()
            with vllm_server(model, directory) as url:
                figures["score_vs_vllm_classify"] = await self._against_http("vllm", grpc, url, items_per_request=16)
            await grpc.close()
        self._detail["threads"] = CORES
        return Measured(figures=figures, detail=self._detail)

    async def _against_oracles(self, grpc: Grpc, model: Path) -> dict[str, float]:
        with oracle_process(model) as oracles:

            def in_process(oracle: str) -> Side:
                async def score(seed: int) -> tuple[float, list[float]]:
                    answer = await asyncio.to_thread(oracles.score, oracle, self._num_prompts, seed)
                    return answer.seconds, answer.scores

                return score

            sides = {"grpc": self._timed(grpc), "packed": in_process("packed"), "cached": in_process("cached")}
            rates = await self._alternate(sides, rounds=1 if self._quick else 6)
        best = max(("packed", "cached"), key=lambda name: median(rates[name]))
        ratio = paired_ratio(rates["grpc"], rates[best])
        self._detail["oracle"] = {"best": best, "ratio": asdict(ratio)} | _spreads(rates)
        return {"score_vs_oracle": ratio.median}

    async def _against_http(self, name: str, grpc: Grpc, url: str, *, items_per_request: int) -> float:
        other = Http(url, items_per_request=items_per_request)
        try:
            sides = {"grpc": self._timed(grpc), name: self._timed(other)}
            rates = await self._alternate(sides, rounds=1 if self._quick else 4)
        finally:
            await other.close()
        ratio = paired_ratio(rates["grpc"], rates[name])
        self._detail[name] = {"ratio": asdict(ratio)} | _spreads(rates)
        return ratio.median

    def _timed(self, score: Grpc | Http) -> Side:
        async def timed(seed: int) -> tuple[float, list[float]]:
            items = draw_items(self._num_prompts, seed=seed)
            start = time.perf_counter()
            scores = await score(items)
            return time.perf_counter() - start, scores

        return timed

    async def _alternate(self, sides: dict[str, Side], *, rounds: int) -> dict[str, list[float]]:
        """Items per second of each, round by round; who goes first changes. The first round only warms up."""
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for index in range(rounds + 1):
            self._seed += 1
            found: dict[str, list[float]] = {}
            for name in sides if index % 2 == 0 else reversed(sides):
                seconds, found[name] = await sides[name](self._seed)
                if index > 0:
                    rates[name].append(len(found[name]) / seconds)
            worst = float(np.max(np.ptp(list(found.values()), axis=0)))
            if worst > TOLERANCE:
                raise RuntimeError(f"{', '.join(sides)} differ by {worst} in a score: they do not run the same model")
        return rates

    def draw(self, num_prompts: int) -> list[Item]:
        """Items that nobody has seen."""
        self._seed += 1
        return draw_items(num_prompts, seed=self._seed)

    @property
    def quick(self) -> bool:
        """Whether the numbers mean nothing."""
        return self._quick

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Adds to what explains the figures."""
        self._detail[name] = facts


class _Latency:
    """Interactive requests while callers keep the queue full, and where the processor time goes meanwhile."""

    def __init__(self, run: _Run, grpc: Grpc, pid: int, metrics_port: int) -> None:
        self._run = run
        self._grpc = grpc
        self._pid = pid
        self._metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self._random = random.Random(3)

    async def measure(self) -> dict[str, float]:
        quick = self._run.quick
        idle = await self._interactive(3 if quick else 30)
        callers = [asyncio.create_task(self._bulk(index)) for index in range(BULK_CALLERS)]
        try:
            await asyncio.sleep(0.5 if quick else 5)
            batch, share, cpu = await self._saturated(1 if quick else 20)
            loaded = await self._interactive(3 if quick else 120)
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
        p99 = float(np.percentile(loaded, 99))
        self._run.note(
            "interactive",
            {
                "idle_s": asdict(spread(idle)),
                "under_load_s": asdict(spread(loaded)),
                "under_load_p99_s": p99,
                "micro_batch_s": batch,
            },
        )
        self._run.note("cpu_seconds", cpu)
        return {"interactive_p99_ratio": p99 / (median(idle) + batch), "grpc_cpu_share": share}

    async def _interactive(self, count: int) -> list[float]:
        """Seconds that each of `count` requests of one item took, one after the other with pauses between them."""
        seconds = []
        for item in self._run.draw(-(-count // 8))[:count]:
            await asyncio.sleep(self._random.uniform(0, 0.1))
            start = time.perf_counter()
            await self._grpc.request([item], priority=Priority.INTERACTIVE)
            seconds.append(time.perf_counter() - start)
        return seconds

    async def _bulk(self, channel: int) -> None:
        while True:
            await self._grpc.request(self._run.draw(BULK_PROMPTS_PER_REQUEST), channel=channel)

    async def _saturated(self, seconds: float) -> tuple[float, float, dict[str, float]]:
        """Seconds of a micro-batch, and share of the server's processor time that is not the model's."""
        runs, cpu, start = self._batch_runs(), self._cpu(), time.perf_counter()
        await asyncio.sleep(seconds)
        after = self._batch_runs()
        elapsed, spent = time.perf_counter() - start, self._cpu()
        run_s, num_runs = after[0] - runs[0], after[1] - runs[1]
        model = spent[MODEL_THREADS] - cpu[MODEL_THREADS]
        others = sum(spent.values()) - sum(cpu.values()) - model
        # Batches run side by side, on a thread each.
        between = max(0.0, NUM_WORKERS * elapsed - run_s)
        share = (others + between) / (others + model)
        facts = {"model": model, "others": others, "between_batches": between, "elapsed": elapsed}
        return run_s / max(1, num_runs), share, facts

    def _batch_runs(self) -> tuple[float, float]:
        """Sum and number of the times of all batches so far."""
        with urllib.request.urlopen(self._metrics_url, timeout=10) as response:
            lines = response.read().decode().splitlines()
        found = {}
        for name in ("sum", "count"):
            prefix = f"steersman_batch_run_seconds_{name}{{"
            found[name] = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(prefix))
        return found["sum"], found["count"]

    def _cpu(self) -> dict[str, float]:
        """Processor seconds of the server so far, by name of thread."""
        spent: dict[str, float] = {MODEL_THREADS: 0.0}
        for thread in psutil.Process(self._pid).threads():
            try:
                name = Path(f"/proc/{self._pid}/task/{thread.id}/comm").read_text().strip()
            except OSError:
                continue
            spent[name] = spent.get(name, 0.0) + thread.user_time + thread.system_time
        return spent


def _spreads(rates: dict[str, list[float]]) -> dict[str, Any]:
    return {f"{name}_scores_per_s": asdict(spread(values)) for name, values in rates.items()}
