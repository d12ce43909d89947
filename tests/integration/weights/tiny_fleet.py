"""Replicas and trainers as processes, and what is seen of them from outside."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tiny_versions import image_of, tensors_of
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.cli import tether
from steersman.cli.supervisor import ServiceSpec, Supervisor, free_port
from steersman.client.policy import AsyncPolicyClient
from steersman.client.types import FinishReason, Sample, WeightState
from steersman.client.weights import AsyncWeightClient
from steersman.wire.identity import WeightVersion

WAIT_S = 90.0
TOLERANCE = 1e-3
"""Of float32 log-probs between vLLM and transformers: twenty times what rounding makes of 400 tokens here, whose logits
are far larger than a trained model's, and a ten thousandth of what the median token of another version shows.
"""
START = WeightVersion()


async def until(is_so: Callable[[], bool], what: str) -> None:
    """Waits for something that only shows from outside."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited for {what}, in vain") from None


class Fleet:
    """Replicas of one tiny model. The first ones are gated: see `replica_program`."""

    def __init__(self, model: Path, directory: Path, *, num_replicas: int, num_gated: int = 1) -> None:
        self.model = model
        # Sorted, as a chain goes through them.
        self.targets = sorted(f"127.0.0.1:{free_port()}" for _ in range(num_replicas))
        self._gates = {target: directory / f"gates-{index}" for index, target in enumerate(self.targets[:num_gated])}
        self._supervisor = Supervisor([self._spec(target) for target in self.targets], start_timeout=WAIT_S)

    def __enter__(self) -> Self:
        self._supervisor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._supervisor.stop()

    def pid(self, target: str) -> int:
        """Of the service; its engine is a child."""
        return self._supervisor[target].pid

    def kill(self, target: str, signal_number: int) -> None:
        """Sends a signal to the service alone."""
        os.kill(self.pid(target), signal_number)

    async def restart(self, target: str) -> None:
        """Once it has ended: starts it again under the same address, with the weights of start-up."""
        process = self._supervisor[target]
        await asyncio.to_thread(process.wait, WAIT_S)
        for path in self._gates[target].iterdir() if target in self._gates else ():
            path.unlink()
        await asyncio.to_thread(process.start)
        await asyncio.to_thread(process.wait_ready, WAIT_S)

    def shut(self, target: str, gate: str) -> None:
        """Shuts a gate of a replica."""
        (self._gates[target] / f"{gate}.entered").unlink(missing_ok=True)
        (self._gates[target] / f"{gate}.shut").touch()

    def open(self, target: str, gate: str) -> None:
        """Opens it again."""
        (self._gates[target] / f"{gate}.shut").unlink()

    async def entered(self, target: str, gate: str) -> None:
        """Returns once the replica stands at the gate."""
        await until((self._gates[target] / f"{gate}.entered").exists, f"{target} at the gate {gate!r}")

    async def state(self, target: str) -> WeightState:
        """What a replica says of its weights."""
        async with AsyncWeightClient(target) as client:
            return await client.state(include_manifest=True)

    async def until_free(self, target: str) -> None:
        """Returns once no push is under way."""
        async with AsyncWeightClient(target) as client, asyncio.timeout(WAIT_S):
            while (await client.state()).pushing is not None:
                await asyncio.sleep(0.02)

    async def assert_serves(self, version: WeightVersion, *targets: str) -> None:
        """They serve this version: its digest is the one that the trainer's weights have, and a new sample has the
        log-probs that transformers gives it under these weights.
        """
        for target in targets:
            state = await self.state(target)
            assert state.active.version == version
            assert state.active.digest == image_of(self.model, version).digest(state.manifest)
            async with AsyncPolicyClient(target) as client:
                (sample,) = await client.generate([7, 8, 9], max_tokens=8, ignore_eos=True, timeout=WAIT_S)
            assert {span.version for span in sample.weight_versions} == {version}
            self.assert_drawn_from([version], [7, 8, 9], sample)

    def assert_drawn_from(self, versions: Sequence[WeightVersion], prompt: list[int], sample: Sample) -> None:
        """Each token has the log-prob that the weights give it whose name it bears; all of `versions` occur."""
        assert sample.finish_reason is FinishReason.LENGTH
        assert [span.version for span in sample.weight_versions] == list(versions)
        for span in sample.weight_versions:
            expected = logprobs_of(self.model, span.version, prompt, sample.token_ids.tolist())
            found = sample.logprobs[span.start : span.end]
            assert np.abs(expected[span.start : span.end] - found).max() < TOLERANCE

    def _spec(self, target: str) -> ServiceSpec:
        arguments = ["--model", str(self.model), "--dtype", "float32", "--kv-cache-mib", "32", "--max-num-seqs", "8"]
        arguments += ["--load-chunk-bytes", "65536", "--port", target.rpartition(":")[2], "--metrics-port", "0"]
        arguments += ["--relay-stall-seconds", "1"]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if (gates := self._gates.get(target)) is None:
            return ServiceSpec.of("policy", arguments, address=target, name=target, environment=environment)
        gates.mkdir()
        program = Path(__file__).with_name("replica_program.py")
        return ServiceSpec(
            name=target,
            command=(sys.executable, str(program), *arguments),
            address=target,
            environment=environment | {"STEERSMAN_TEST_GATES": str(gates)},
        )


class Trainer:
    """A `publisher_program`."""

    def __init__(self, process: asyncio.subprocess.Process, run_id: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._process = process
        self._run_id = run_id
        self._num_seen = 0

    @classmethod
    @asynccontextmanager
    async def of(cls, fleet: Fleet, run_id: str, targets: Sequence[str] = (), **settings: Any) -> AsyncIterator[Self]:
        """A trainer for these replicas, all by default; killed at the end."""
        settings = {"model": str(fleet.model)} | settings
        settings |= {"run_id": run_id, "targets": list(targets or fleet.targets)}
        program = Path(__file__).with_name("publisher_program.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            tether.__file__,
            str(os.getpid()),
            sys.executable,
            str(program),
            json.dumps(settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        trainer = cls(process, run_id)
        try:
            await trainer.expect("ready")
            yield trainer
        finally:
            await trainer.kill()

    def version(self, step: int) -> WeightVersion:
        """Of its run."""
        return WeightVersion(run_id=self._run_id, step=step)

    async def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def tell(self, do: str, **what: Any) -> None:
        """Sends a command."""
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps({"do": do} | what) + "\n").encode())
        await self._process.stdin.drain()

    async def expect(self, event: str, **what: Any) -> dict[str, Any]:
        """The next event of this kind, and with these fields, of those not expected before; others are passed over."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    found = await self._next()
                    if found.items() >= ({"event": event} | what).items():
                        return found
                    assert found["event"] not in ("failed", "refused", "given_up"), (
                        f"waited for {event} {what}: {self.events}"
                    )
        except TimeoutError:
            raise AssertionError(f"no {event} {what} among {self.events}") from None

    async def publish(self, step: int, faults: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Publishes, and waits for the end: the report."""
        await self.tell("publish", step=step, faults=list(faults))
        return await self.expect("published")

    async def ensure(self, target: str) -> None:
        """Has a replica driven to the wanted weights."""
        await self.tell("ensure", target=target)
        await self.expect("current", target=target)

    def errors(self, target: str) -> list[tuple[str, str]]:
        """Calls that the replica refused so far, and why."""
        return [
            (event["call"], event["reason"])
            for event in self.events
            if event["event"] == "error" and event["target"] == target
        ]

    async def _next(self) -> dict[str, Any]:
        if self._num_seen == len(self.events):
            assert self._process.stdout is not None
            line = await self._process.stdout.readline()
            assert line, f"the trainer ended with {await self._process.wait()}, after {self.events}"
            self.events.append(json.loads(line))
        self._num_seen += 1
        return self.events[self._num_seen - 1]


@cache
def _model_of(folder: Path, version: WeightVersion) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    model.load_state_dict(tensors_of(folder, version))
    return model.eval()


def logprobs_of(
    folder: Path, version: WeightVersion, prompt: list[int], tokens: list[int]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[num_tokens] log-probs of the tokens in one forward pass of a version."""
    with torch.no_grad():
        logits = _model_of(folder, version)(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    found = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return found.numpy()
