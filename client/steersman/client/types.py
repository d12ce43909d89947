"""What the clients take and return: frozen dataclasses of numpy arrays and plain Python types.

>>> sample.token_ids, sample.logprobs             # int32[length], float32[length]
>>> sample.weight_versions                        # (VersionSpan(version=run@3, start=0, end=7), ...)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.wire.errors import SteersmanError
from steersman.wire.identity import ModelInfo, VersionSpan, WeightVersion

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation. `role` is "system", "user", "assistant" or what the chat template knows."""

    role: str
    content: str


# Token ids, plain text, or a conversation (dataclasses, or mappings with "role" and "content").
TokenIds = Sequence[int] | NDArray[np.integer[Any]]
Conversation = Sequence[ChatMessage | Mapping[str, str]]
Prompt = str | TokenIds | Conversation


class FinishReason(StrEnum):
    """Why a sample ended: at end-of-sequence or a stop, at its length limit, or because the engine gave up."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One finished response.

    Attributes:
        index: which of the samples of the prompt, [0, num_samples).
        token_ids: int32[length], with the end-of-sequence token if one was drawn.
        logprobs: float32[length], natural log, under the distribution that each token was drawn from.
        weight_versions: which weights produced which tokens; together they cover all tokens, in order.
        finish_reason: why it ended. An ABORTED sample is cut off and should not be trained on.
        stop_reason: the stop token id or text that ended it, empty if that was the end-of-sequence token.
        text: the response as text, if `return_text` was asked for, else empty.
        prompt_token_ids: int32[prompt length], the prompt as the engine saw it, if it was given as text or chat.
        model: the model that answered.
        time_to_first_token_seconds: from the arrival at the server to the first token.
    """

    index: int
    token_ids: IntArray
    logprobs: FloatArray
    weight_versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    stop_reason: str = ""
    text: str = ""
    prompt_token_ids: IntArray | None = None
    model: ModelInfo | None = None
    time_to_first_token_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleDelta:
    """New tokens of one sample; the fields are those of `Sample`, for the new tokens only.

    `finish_reason` is set on the last delta of a sample. Version spans count in the whole sample.
    """

    index: int
    token_ids: IntArray
    logprobs: FloatArray
    weight_versions: tuple[VersionSpan, ...]
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Logprobs:
    """Log-probs of the response tokens of some sequences, in their order.

    Attributes:
        logprobs: one float32[response length] a sequence, natural log.
        entropies: rows as in `logprobs`, entropy in nats; None unless asked for.
        model: the model that answered; None if there was nothing to ask.
    """

    logprobs: list[FloatArray]
    entropies: list[FloatArray] | None = None
    model: ModelInfo | None = None


class Overlength(StrEnum):
    """What to do with an item that is longer than the scorer accepts: fail it, or shorten its prompt."""

    FAIL = "fail"
    TRUNCATE_PROMPT = "truncate_prompt"


class Priority(StrEnum):
    """Whether somebody waits for the answer, or throughput counts."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreItem:
    """Something to score: a prompt and the response to it, both token ids, both text, or a conversation and its reply.

    Attributes:
        prompt: token ids, text or conversation. Token ids may be empty if `response` holds the whole sequence.
        response: token ids or text, as the prompt; after a conversation, a message, or text from the assistant.
        id: returned with the score. May be empty.
        context: JSON facts for scoring functions, for example {"ground_truth": "42"}.
        timeout_seconds: the item fails when it was not scored for so long; None: the deadline of the call.
    """

    prompt: Prompt
    response: str | TokenIds | ChatMessage
    id: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    timeout_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class MemberScore:
    """The part of one scorer in a combined score; exactly one of `value` and `error` is set. Else as in `Score`."""

    scorer: str
    value: float | None
    error: SteersmanError | None
    weight: float
    model: str = ""
    revision: str = ""
    raw: float | None = None
    length_penalty: float | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one item. Exactly one of `value` and `error` is set: a failure never looks like a value.

    Attributes:
        id: of the item.
        value: the score, finite.
        error: why there is none.
        raw: the score before normalisation and length penalty, if asked for.
        length_penalty: what was subtracted for a long response; None if the scorer has no such penalty.
        members: parts of a combined score.
        spread: standard deviation of the members.
        truncated: the prompt was shortened to fit.
        num_tokens: tokens that were scored.
        scorer: who answered; model: by which loaded model; revision: of that model. A combined score has them in its
            members.
    """

    id: str
    value: float | None
    error: SteersmanError | None
    raw: float | None = None
    length_penalty: float | None = None
    members: tuple[MemberScore, ...] = ()
    spread: float | None = None
    truncated: bool = False
    num_tokens: int = 0
    scorer: str = ""
    model: str = ""
    revision: str = ""

    def unwrap(self) -> float:
        """The value; raises the item's error if there is none."""
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


class ScorerKind(StrEnum):
    """What a scorer is."""

    MODEL = "model"
    FUNCTION = "function"
    ENSEMBLE = "ensemble"


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One scorer of a reward service. `members` are the names that an ensemble combines."""

    name: str
    kind: ScorerKind
    model: ModelInfo | None
    members: tuple[str, ...]
    is_default: bool


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a model in Hugging Face name and layout. `dtype` is a torch name such as "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class WeightEncoding(StrEnum):
    """How a chunk encodes its elements."""

    DENSE = "dense"
    SPARSE_DELTA = "sparse_delta"


class KvCachePolicy(StrEnum):
    """What happens to the key-value cache of running requests when weights change."""

    SERVER_DEFAULT = "server_default"
    KEEP = "keep"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, kw_only=True)
class WeightChunk:
    """Elements of one tensor of the manifest.

    Attributes:
        tensor_index: index in the manifest.
        element_offset: first element, counted in the flattened tensor.
        num_elements: elements covered (in a sparse delta: the described span, changed or not).
        data: the encoded elements, little-endian; a view is sent without another copy.
        checksum: XXH3-64 of `data`, unsigned.
        encoding: how `data` is encoded.
    """

    tensor_index: int
    element_offset: int
    num_elements: int
    data: bytes | memoryview
    checksum: int
    encoding: WeightEncoding = WeightEncoding.DENSE


@dataclass(frozen=True, kw_only=True)
class WeightSnapshot:
    """A version and the XXH3-128 digest of all its weights (16 bytes, big-endian)."""

    version: WeightVersion
    digest: bytes
    activate_time: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class WeightState:
    """What a replica serves, what it could switch to, and the push under way."""

    active: WeightSnapshot
    staged: WeightSnapshot | None
    previous: WeightSnapshot | None
    pushing: WeightVersion | None
    manifest: tuple[TensorSpec, ...]
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Push:
    """An open push. `already_active`: there is nothing to push, and `push_id` is empty."""

    push_id: str
    max_chunk_bytes: int
    already_active: bool


@dataclass(frozen=True, kw_only=True)
class RelayHop:
    """A replica that gets a chunk stream from the one before it, into `push_id`, and passes it on to `next`."""

    target: str
    push_id: str
    next: tuple["RelayHop", ...] = ()


@dataclass(frozen=True, kw_only=True)
class RelayReceipt:
    """What became of one hop. `error`: why it did not take every chunk; its push is then to be begun anew."""

    target: str
    error: SteersmanError | None = None
    received_bytes: int = 0
    num_chunks: int = 0


@dataclass(frozen=True, kw_only=True)
class PushReceipt:
    """What one chunk stream delivered: to its receiver, and to each replica that it was passed on to."""

    received_bytes: int
    num_chunks: int
    relayed: tuple[RelayReceipt, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A switch of weights: what is active now, how long generation stood still, and how many requests went on."""

    active: WeightSnapshot
    pause_seconds: float
    num_running_requests: int = 0


class JobKind(StrEnum):
    """What a job trains."""

    SFT = "sft"
    REWARD_MODEL = "reward_model"
    PPO = "ppo"


class JobState(StrEnum):
    """Where a job stands."""

    PENDING = "pending"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """True if the job has ended; only a resume moves it on."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class JobResources:
    """What a job needs. 0 and empty mean: no limit, or the server's choice; without `processes_per_node` all processes
    are on one node.
    """

    num_processes: int = 1
    gpus_per_process: int = 0
    cpus_per_process: float = 0.0
    memory_bytes_per_process: int = 0
    queue_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    processes_per_node: int = 0


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How far a job is. `total_steps` is 0 if unknown; `message` says what it does or waits for."""

    step: int
    total_steps: int
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """The job changed its state; `error` says why it failed."""

    state: JobState
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Numbers of a finished step under the field's names, for example "objective/kl"."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One event of a job. `sequence` ascends without gaps; `event` says what happened."""

    sequence: int
    time: datetime
    event: StateChange | JobProgress | StepMetrics


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job. Times are UTC and None before they happen; whole numbers of `config` are ints."""

    id: str
    kind: JobKind
    config: Mapping[str, Any]
    resources: JobResources
    state: JobState
    progress: JobProgress
    run_directory: str
    error: str = ""
    create_time: datetime | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    num_attempts: int = 0
