"""What the policy service needs of a generation engine, free of gRPC, protobuf and vLLM.

Invariants that every engine keeps:

- every token is stamped with the weights that produced it;
- closing or cancelling the iterator of `generate` aborts the request in the engine;
- `stage` never disturbs the weights that serve, and `activate` either switches completely or not at all.
"""

import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from steersman.wire.identity import ModelInfo, VersionSpan, WeightVersion

MAX_SEED: Final = 2**63 - 1
"""Generators take a signed 64-bit seed, and a negative one means none to some."""


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request with `seed`, [0, MAX_SEED]; sample 0 draws with `seed` itself.

    The others take the low 63 bits of BLAKE2b-64 of "SEED/INDEX", little-endian. With `seed + index` sample 1 of
    seed 7 would be sample 0 of seed 8: a caller that numbers its requests would train on the same response twice.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & MAX_SEED


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "abort"


class KvCachePolicy(StrEnum):
    """What happens to the key-value cache of running requests when weights change.

    KEEP is the shortest pause: their log-probs stay those of the distribution that was sampled from.
    RECOMPUTE fills the cache again under the new weights.
    """

    KEEP = "keep"
    RECOMPUTE = "recompute"


class EngineDeadError(RuntimeError):
    """The engine cannot generate any more; only a new process helps."""


class WeightLoadError(RuntimeError):
    """The engine could not take the offered weights; the version before serves on."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to sample from it. All values are checked before they get here.

    Example: 2 samples of at most 16 tokens, sent whole:
    `GenerationRequest(request_id="r1", prompt_token_ids=[1, 2], max_tokens=16, num_samples=2,
    final_only=True)`. Sample i draws with `sample_seed(seed, i)`.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    priority: int = 0
    final_only: bool = False
    return_text: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleDelta:
    """New tokens of one sample.

    `logprobs` are natural logs under the distribution that was drawn from, one for each of `token_ids`.
    `versions` cover `token_ids` exactly, in order, with indices that count in the whole sample.
    """

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str = ""
    text: str = ""
    time_to_first_token_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that is served. `info.weight_version` is the start-up set, always."""

    info: ModelInfo
    has_tokenizer: bool
    has_chat_template: bool


@dataclass(frozen=True, kw_only=True)
class TensorSlot:
    """Where one tensor lies in a host copy: `nbytes` bytes from `offset_bytes`, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class HostWeights:
    """A complete copy of the weights in host memory, in Hugging Face names and layout.

    `path` can be opened by any process of the same user for as long as the owner keeps the memory.
    """

    path: str
    nbytes: int
    slots: tuple[TensorSlot, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """How a switch of weights went: how long generation stood still, and how many requests went on through
    it.
    """

    pause_s: float
    num_running_requests: int


class GenerationEngine(Protocol):
    """A live model. All methods are called on one event loop."""

    @property
    def facts(self) -> ModelFacts:
        """What is served."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Samples that are running or queued."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[SampleDelta, None]:
        """Samples, in the order in which tokens come. Aborts the request when closed or cancelled.

        Raises `EngineDeadError` when the engine died.
        """
        ...

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text`. Only if `facts.has_tokenizer`."""
        ...

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, content) turns with a generation prompt. Only if `facts.has_chat_template`.

        Raises `ValueError` when the template does not accept the turns.
        """
        ...

    def check_health(self) -> None:
        """Raises `EngineDeadError` when the engine died."""
        ...

    async def stage(self, weights: HostWeights) -> None:
        """Prepares `weights` beside the ones that serve. Raises `WeightLoadError` if they do not fit."""
        ...

    async def discard_staged(self) -> None:
        """Forgets what `stage` prepared. Does nothing if there is nothing."""
        ...

    async def activate(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        """Switches to the staged `weights` and stamps later tokens with `version`. No request is aborted.

        Raises `WeightLoadError` when the switch failed and the weights before serve on.
        """
        ...

    async def rollback(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        """Switches back to the weights before the last `activate`; `weights` is their host copy."""
        ...

    async def shutdown(self) -> None:
        """Ends the engine and all its processes."""
        ...
