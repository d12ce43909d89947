"""A generation engine and a weight source that need no model, for the tests of the policy service."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from steersman.policy.engine.port import (
    Activation,
    EngineDeadError,
    FinishReason,
    GenerationRequest,
    HostWeights,
    KvCachePolicy,
    ModelFacts,
    SampleDelta,
    WeightLoadError,
)
from steersman.policy.weights.manifest import HostManifest, TensorSpec
from steersman.wire.identity import ModelInfo, VersionSpan, WeightVersion
from steersman.wire.weights.messages import Chunk

VOCAB_SIZE = 50
MAX_SEQUENCE_TOKENS = 20
MANIFEST = HostManifest.of(
    [
        TensorSpec(name="b.weight", shape=(3, 4), dtype="float32"),
        TensorSpec(name="a.weight", shape=(5,), dtype="bfloat16"),
        TensorSpec(name="c.scale", shape=(), dtype="float32"),
    ]
)


class FakeEngine:
    """Counts upwards: token i of a sample is its prompt's last token + sample index + i, modulo the vocabulary.

    `events` tells what happened in order. `gate` holds generation back while it is cleared, after
    `num_free_tokens` tokens. Names in `failing` make
    the weight operation of that name fail; `dead` makes everything fail.
    """

    def __init__(self, *, has_tokenizer: bool = True) -> None:
        info = ModelInfo(
            name="fake",
            vocab_size=VOCAB_SIZE,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
            eos_token_ids=(VOCAB_SIZE - 1,),
        )
        self.facts = ModelFacts(info=info, has_tokenizer=has_tokenizer, has_chat_template=has_tokenizer)
        self.events: list[str] = []
        self.failing: set[str] = set()
        self.dead = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_free_tokens = 0
        self.hold_stage = asyncio.Event()
        self.hold_stage.set()
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.num_unfinished = 0
        self.version = WeightVersion()
        self.loaded = b""
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SampleDelta, None]:
        self.requests.append(request)
        self.num_unfinished += request.num_samples
        self.started.set()
        finished = False
        try:
            if request.final_only:
                for index in range(request.num_samples):
                    yield self._delta(request, index, 0, request.max_tokens)
            else:
                for position in range(request.max_tokens):
                    if position >= self.num_free_tokens:
                        await self.gate.wait()
                    if self.dead:
                        raise EngineDeadError("fake")
                    for index in range(request.num_samples):
                        yield self._delta(request, index, position, position + 1)
            finished = True
        finally:
            self.num_unfinished -= request.num_samples
            self.events.append("finished" if finished else "aborted")
            self.ended.set()

    def _delta(self, request: GenerationRequest, index: int, start: int, end: int) -> SampleDelta:
        first = request.prompt_token_ids[-1] + index
        last = end == request.max_tokens
        return SampleDelta(
            index=index,
            token_ids=[(first + position) % VOCAB_SIZE for position in range(start, end)],
            logprobs=[-0.5] * (end - start),
            versions=(VersionSpan(version=self.version, start=start, end=end),),
            finish_reason=FinishReason.LENGTH if last else None,
            time_to_first_token_s=0.25 if last else None,
        )

    def encode_text(self, text: str) -> list[int]:
        return [ord(char) % VOCAB_SIZE for char in text]

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        if any(role == "alien" for role, _ in messages):
            raise ValueError("no such role")
        return [ord(char) % VOCAB_SIZE for role, content in messages for char in role + content]

    def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError("fake")

    def _happen(self, name: str) -> None:
        self.events.append(name)
        if self.dead:
            raise EngineDeadError("fake")
        if name in self.failing:
            raise WeightLoadError("fake")

    async def stage(self, weights: HostWeights) -> None:
        await self.hold_stage.wait()
        self._happen("stage")
        self.loaded = Path(weights.path).read_bytes()

    async def discard_staged(self) -> None:
        self._happen("discard")

    async def activate(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        self._happen("activate")
        self.events.append(f"{version} {kv_cache}")
        self.version = version
        return Activation(pause_s=0.125, num_running_requests=self.num_unfinished)

    async def rollback(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        self._happen("rollback")
        self.version = version
        self.loaded = Path(weights.path).read_bytes()
        return Activation(pause_s=0.125, num_running_requests=0)

    async def shutdown(self) -> None:
        self.events.append("shutdown")


class FakeSource:
    """Start-up weights: every byte is 7."""

    manifest = MANIFEST

    def read_into(self, copy: memoryview) -> None:
        for slot in self.manifest.slots:
            copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes] = b"\7" * slot.nbytes


def random_weights(seed: int) -> dict[str, bytes]:
    """Bytes for every tensor of `MANIFEST`."""
    generator = np.random.default_rng(seed)
    return {tensor.name: generator.bytes(tensor.nbytes) for tensor in MANIFEST.tensors}


def slow_digest(weights: dict[str, bytes]) -> bytes:
    """The digest as the contract words it, for tensors of one tile each."""
    assert all(len(data) <= 131_072 for data in weights.values())
    tiles = {name: xxhash.xxh3_128_digest(data) if data else b"" for name, data in weights.items()}
    return xxhash.xxh3_128_digest(b"".join(name.encode() + b"\0" + tiles[name] for name in sorted(weights)))


def chunks(weights: dict[str, bytes], max_elements: int = 4) -> list[Chunk]:
    """All elements of `weights`, in order."""
    found = []
    for index, tensor in enumerate(MANIFEST.tensors):
        size = tensor.item_bytes
        for offset in range(0, tensor.num_elements, max_elements):
            num_elements = min(max_elements, tensor.num_elements - offset)
            data = weights[tensor.name][offset * size : (offset + num_elements) * size]
            found.append(
                Chunk(
                    tensor_index=index,
                    element_offset=offset,
                    num_elements=num_elements,
                    data=data,
                    checksum=xxhash.xxh3_64_intdigest(data),
                )
            )
    return found


def host_bytes(weights: dict[str, bytes]) -> bytes:
    """How `weights` lie in a host copy."""
    copy = bytearray(MANIFEST.nbytes)
    for slot in MANIFEST.slots:
        copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes] = weights[slot.name]
    return bytes(copy)
