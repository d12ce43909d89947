"""A trainer without training: publishes versions of a tiny model through the real publisher, as it is told.

One JSON object with the settings is the argument. Then commands come on stdin and events go to stdout, an object a
line; the end of stdin is the end. `do` is one of

    publish    `step`, with `faults`: a list of {target, call, kind}, and `chunk`, `times`
    ensure     `target`: drive it to the wanted weights, as before a prompt
    go         lets calls go on that a fault of kind "hold" has stopped

A fault changes what this process sends to one replica, and is used up after `times` calls. Kinds for every call:
"hold" stops before it (in "push", before chunk number `chunk`). Kinds for "push", each at that chunk: "flip" changes a
bit, "forge" changes it and makes the checksum anew, "double" sends the chunk twice, "swap" after its successor, "lose"
not at all. For "begin": "reshape" announces another shape for a tensor.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiny_versions import image_of

from steersman.client.types import Activation, Push, PushReceipt, RelayHop, TensorSpec, WeightChunk, WeightSnapshot
from steersman.client.weights import AsyncWeightClient
from steersman.trainer.retry import Backoff, GaveUp, Waits, retry
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.ports import WeightsRefused
from steersman.trainer.weights.publication import QuorumNotStaged
from steersman.trainer.weights.publisher import Publisher
from steersman.trainer.weights.relay import RelayDelivery, RelaySettings
from steersman.trainer.weights.routes import Topology
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.wire.errors import SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.digest import chunk_checksum


def say(event: str, **what: Any) -> None:
    sys.stdout.write(json.dumps({"event": event} | what) + "\n")
    sys.stdout.flush()


@dataclass(kw_only=True)
class Fault:
    target: str
    call: str
    kind: str
    chunk: int = 0
    times: int = 1


class Faults:
    """What is still to go wrong."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.pending: list[Fault] = []

    def take(self, target: str, call: str) -> Fault | None:
        for fault in self.pending:
            if (fault.target, fault.call) == (target, call) and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    async def hold(self, target: str, call: str) -> None:
        say("held", target=target, call=call)
        await self.go.wait()


class FaultyClient(AsyncWeightClient):
    """The real client, with faults of the sender. Says what the replica refused."""

    faults: Faults

    async def begin(self, version: WeightVersion, manifest: Sequence[TensorSpec], **rest: Any) -> Push:
        fault = await self._before("begin")
        if fault is not None and fault.kind == "reshape":
            (rows, columns), rest_of_it = manifest[0].shape, manifest[1:]
            manifest = (replace(manifest[0], shape=(columns, rows)), *rest_of_it)
        base = rest.get("base_version")
        say("begins", target=self.target, version=str(version), base=str(base) if base else None)
        return await self._said("begin", super().begin(version, manifest, **rest))

    async def push(
        self, push_id: str, chunks: Any, *, relay: Sequence[RelayHop] = (), timeout: float | None = None
    ) -> PushReceipt:
        fault = self.faults.take(self.target, "push")
        faulty = self._disturbed(chunks, fault) if fault is not None else chunks
        return await self._said("push", super().push(push_id, faulty, relay=relay, timeout=timeout))

    async def stage(self, push_id: str, digest: bytes, *, timeout: float | None = None) -> WeightSnapshot:
        await self._before("stage")
        return await self._said("stage", super().stage(push_id, digest, timeout=timeout))

    async def activate(self, version: WeightVersion, **rest: Any) -> Activation:
        await self._before("activate")
        return await self._said("activate", super().activate(version, **rest))

    async def _before(self, call: str) -> Fault | None:
        fault = self.faults.take(self.target, call)
        if fault is not None and fault.kind == "hold":
            await self.faults.hold(self.target, call)
        return fault

    async def _said(self, call: str, result: Any) -> Any:
        try:
            return await result
        except SteersmanError as error:
            reason = error.reason.name if error.reason is not None else error.code.name
            say("error", target=self.target, call=call, reason=reason, message=str(error))
            raise

    async def _disturbed(self, chunks: AsyncIterator[WeightChunk], fault: Fault) -> AsyncIterator[WeightChunk]:
        number, held_back = 0, None
        async for chunk in chunks:
            hit, number = number == fault.chunk, number + 1
            if hit and fault.kind == "hold":
                await self.faults.hold(self.target, "push")
            if hit and fault.kind == "swap":
                held_back = chunk
                continue
            if not (hit and fault.kind == "lose"):
                yield _changed(chunk, fault.kind) if hit else chunk
            if hit and fault.kind == "double":
                yield chunk
            if held_back is not None:
                yield held_back
                held_back = None
        assert number > fault.chunk + 1, f"a push of {number} chunks has no chunk {fault.chunk} with a successor"


def _changed(chunk: WeightChunk, kind: str) -> WeightChunk:
    if kind not in ("flip", "forge"):
        return chunk
    data = bytearray(chunk.data)
    data[len(data) // 2] ^= 0x10
    return replace(chunk, data=bytes(data), checksum=chunk_checksum(data) if kind == "forge" else chunk.checksum)


class Program:
    """The publisher and the commands for it."""

    def __init__(self, model: Path, run_id: str, targets: Sequence[str], settings: dict[str, Any]) -> None:
        self._model = model
        self._faults = Faults()
        self._tasks: set[asyncio.Task[None]] = set()
        self._backoff, self._waits = Backoff(initial_seconds=0.1, max_seconds=0.5, give_up_seconds=60.0), Waits()
        topology = Topology(settings.pop("topology", "direct"))
        self._publisher = Publisher(
            self._connect,
            run_id=run_id,
            targets=targets,
            settings=PublishSettings(
                activation=ActivationMode(settings.pop("activation", "as_staged")),
                encoding=PushEncoding.DELTA,
                **settings,
            ),
            backoff=self._backoff,
            waits=self._waits,
            delivery=RelayDelivery(RelaySettings(topology=topology, stall_seconds=2.0)),
        )

    async def run(self) -> None:
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        say("ready")
        while line := await lines.readline():
            task = asyncio.create_task(self._do(json.loads(line)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await self._publisher.close()

    async def _do(self, command: dict[str, Any]) -> None:
        try:
            match command["do"]:
                case "publish":
                    await self._publish(command["step"], command.get("faults", []))
                case "ensure":
                    await self._ensure(command["target"])
                case "go":
                    self._faults.go.set()
        except WeightsRefused as error:
            say("refused", message=str(error))
        except (SteersmanError, GaveUp) as error:
            say("failed", kind=type(error).__name__, message=str(error))

    async def _publish(self, step: int, faults: Sequence[dict[str, Any]]) -> None:
        self._faults.go.clear()
        self._faults.pending = [Fault(**fault) for fault in faults]
        version = WeightVersion(run_id=self._publisher.run_id, step=step)
        try:
            report = await self._publisher.publish(image_of(self._model, version))
        except QuorumNotStaged as error:
            say("given_up", version=str(version), message=str(error))
            return
        say("published", version=str(version), failures=report.failures, delta_share=report.delta_share)

    async def _ensure(self, target: str) -> None:
        await retry(
            lambda: self._publisher.ensure_current(target), what=target, backoff=self._backoff, waits=self._waits
        )
        say("current", target=target, version=str(self._publisher.wanted))

    def _connect(self, target: str) -> FaultyClient:
        client = FaultyClient(target)
        client.faults = self._faults
        return client


def main() -> None:
    settings = json.loads(sys.argv[1])
    program = Program(Path(settings.pop("model")), settings.pop("run_id"), settings.pop("targets"), settings)
    asyncio.run(program.run())


if __name__ == "__main__":
    main()
