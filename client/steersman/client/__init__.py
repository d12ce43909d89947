"""The SDK of Steersman: blocking and asyncio clients of the policy, reference, reward, trainer and weight services.

Needs grpcio, protobuf and numpy, nothing heavier. Failures are `SteersmanError`; every call has a deadline.

    >>> from steersman.client import PolicyClient, RewardClient
    >>> with PolicyClient("127.0.0.1:50051") as policy, RewardClient("127.0.0.1:50053") as reward:
    ...     samples = policy.generate("Tell me a story.", num_samples=4, max_tokens=64, return_text=True)
    ...     scores = reward.score(prompt="Tell me a story.", responses=[sample.text for sample in samples])
"""

from steersman.client.calls import request_id
from steersman.client.channel import ChannelSettings, Credentials
from steersman.client.health import AsyncHealthClient, HealthClient, ServingStatus
from steersman.client.policy import AsyncPolicyClient, GenerateOptions, PolicyClient
from steersman.client.reference import AsyncReferenceClient, ReferenceClient
from steersman.client.reward import AsyncRewardClient, RewardClient
from steersman.client.reward_models import (
    AsyncRewardModelClient,
    RewardModel,
    RewardModelClient,
    RewardModelState,
    ScorerSwitch,
)
from steersman.client.trainer import AsyncTrainerClient, TrainerClient
from steersman.client.types import (
    Activation,
    ChatMessage,
    FinishReason,
    Job,
    JobEvent,
    JobKind,
    JobProgress,
    JobResources,
    JobState,
    KvCachePolicy,
    Logprobs,
    MemberScore,
    Overlength,
    Priority,
    Push,
    PushReceipt,
    RelayHop,
    RelayReceipt,
    Sample,
    SampleDelta,
    Score,
    ScoreItem,
    Scorer,
    ScorerKind,
    StateChange,
    StepMetrics,
    TensorSpec,
    WeightChunk,
    WeightEncoding,
    WeightSnapshot,
    WeightState,
)
from steersman.client.weights import AsyncWeightClient, WeightClient
from steersman.wire.errors import Code, FieldViolation, Reason, SteersmanError
from steersman.wire.identity import ModelInfo, VersionSpan, WeightVersion

__all__ = [
    "Activation",
    "AsyncHealthClient",
    "AsyncPolicyClient",
    "AsyncReferenceClient",
    "AsyncRewardClient",
    "AsyncRewardModelClient",
    "AsyncTrainerClient",
    "AsyncWeightClient",
    "ChannelSettings",
    "ChatMessage",
    "Code",
    "Credentials",
    "FieldViolation",
    "FinishReason",
    "GenerateOptions",
    "HealthClient",
    "Job",
    "JobEvent",
    "JobKind",
    "JobProgress",
    "JobResources",
    "JobState",
    "KvCachePolicy",
    "Logprobs",
    "MemberScore",
    "ModelInfo",
    "Overlength",
    "PolicyClient",
    "Priority",
    "Push",
    "PushReceipt",
    "Reason",
    "ReferenceClient",
    "RelayHop",
    "RelayReceipt",
    "RewardClient",
    "RewardModel",
    "RewardModelClient",
    "RewardModelState",
    "Sample",
    "SampleDelta",
    "Score",
    "ScoreItem",
    "Scorer",
    "ScorerKind",
    "ScorerSwitch",
    "ServingStatus",
    "StateChange",
    "SteersmanError",
    "StepMetrics",
    "TensorSpec",
    "TrainerClient",
    "VersionSpan",
    "WeightChunk",
    "WeightClient",
    "WeightEncoding",
    "WeightSnapshot",
    "WeightState",
    "WeightVersion",
    "request_id",
]
