"""The servers that the reward service is compared with, each a process of its own, and the load for all of them."""

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from benchmarks.reward_load import LONGEST, Item, as_json, requests_of
from benchmarks.stack import CORES, START_SECONDS, tail, thread_environment
from steersman.cli.supervisor import free_port
from steersman.client import AsyncRewardClient, Priority, ScoreItem

ITEMS_PER_REQUEST = 16
CHANNELS = 4
CONCURRENT_REQUESTS = 64


class Grpc:
    """Scores through the reward service: requests of several items, all in flight, over several channels."""

    def __init__(self, target: str) -> None:
        self._clients = [AsyncRewardClient(target) for _ in range(CHANNELS)]

    async def __call__(self, items: Sequence[Item]) -> list[float]:
        """Scores in the order of the items."""
        parts = requests_of(items, ITEMS_PER_REQUEST)
        calls = [self.request(part, channel=index) for index, part in enumerate(parts)]
        return [score for part in await asyncio.gather(*calls) for score in part]

    async def request(
        self, items: Sequence[Item], *, channel: int = 0, priority: Priority = Priority.BULK
    ) -> list[float]:
        """One request."""
        asked = [ScoreItem(prompt=item.prompt, response=item.response) for item in items]
        scores = await self._clients[channel % CHANNELS].score(asked, priority=priority, timeout=600)
        return [score.unwrap() for score in scores]

    async def close(self) -> None:
        """Ends the channels."""
        for client in self._clients:
            await client.close()


class Http:
    """Scores through an HTTP server that speaks vLLM's /classify."""

    def __init__(self, url: str, *, items_per_request: int) -> None:
        self._url = url
        self._items_per_request = items_per_request
        connections = aiohttp.TCPConnector(limit=CONCURRENT_REQUESTS)
        self._session = aiohttp.ClientSession(connector=connections, timeout=aiohttp.ClientTimeout(total=600))

    async def __call__(self, items: Sequence[Item]) -> list[float]:
        """Scores in the order of the items."""
        calls = [self._request(part) for part in requests_of(items, self._items_per_request)]
        return [score for part in await asyncio.gather(*calls) for score in part]

    async def _request(self, items: Sequence[Item]) -> list[float]:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=as_json(items), headers=headers) as response:
            response.raise_for_status()
            content = await response.json()
        return [float(result["probs"][0]) for result in content["data"]]

    async def close(self) -> None:
        """Ends the connections."""
        await self._session.close()


@contextmanager
def single_server(model: Path, directory: Path) -> Iterator[str]:
    """The one-sample-per-request server; its URL."""
    port = free_port()
    command = ["-m", "benchmarks.reward_single", str(model), str(port)]
    with _started(command, f"http://127.0.0.1:{port}/", directory / "single.log", {}) as url:
        yield url


@contextmanager
def vllm_server(model: Path, directory: Path) -> Iterator[str]:
    """vLLM's own API server with its prefix cache on; the URL of /classify."""
    port = free_port()
    flags = {
        "model": model,
        "host": "127.0.0.1",
        "port": port,
        "runner": "pooling",
        "block-size": 32,
        "kv-cache-memory-bytes": 2**30,
        "max-model-len": LONGEST,
        "max-num-batched-tokens": 4096,
        "pooler-config": '{"use_activation": false}',
        "uvicorn-log-level": "warning",
    }
    command = ["-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-prefix-caching"]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    # Left to itself vLLM keeps one of the cores free for its scheduler: on two cores that would halve its speed.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with _started(command, f"http://127.0.0.1:{port}/health", directory / "vllm.log", environment) as url:
        yield url.replace("/health", "/classify")


@contextmanager
def _started(command: list[str], health_url: str, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """A Python process that answers at `health_url` inside the block, and has ended after it."""
    variables = os.environ | thread_environment(CORES) | {"HF_HUB_OFFLINE": "1"} | environment
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen([sys.executable, *command], stdout=stream, stderr=stream, env=variables)
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(health_url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[1]} did not start:\n{tail(log)}")
            time.sleep(0.2)
        yield health_url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
