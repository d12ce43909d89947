"""The role that each RPC asks for. Closed: an RPC without an entry is refused to everyone, and a test says so."""

from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """What a caller may do. Reading what a service is, and the status of a call, is for every known caller."""

    GENERATE = "generate"
    """Draw samples from a policy."""
    LOGPROBS = "logprobs"
    """Ask a reference for log-probs."""
    SCORE = "score"
    """Ask for scores, in whatever protocol."""
    PUSH_WEIGHTS = "push_weights"
    """Replace the weights of a policy."""
    MANAGE_MODELS = "manage_models"
    """Load, switch and unload reward models."""
    MANAGE_JOBS = "manage_jobs"
    """Create, cancel and resume training jobs."""


_STEERSMAN: Final[dict[str, dict[str, Role | None]]] = {
    "PolicyService": {"Generate": Role.GENERATE, "GetModel": None},
    "ReferenceService": {"ComputeLogprobs": Role.LOGPROBS, "GetModel": None},
    "RewardService": {"Score": Role.SCORE, "StreamScore": Role.SCORE, "ListScorers": None},
    "RewardModelService": {
        "LoadModel": Role.MANAGE_MODELS,
        "SwitchScorer": Role.MANAGE_MODELS,
        "UnloadModel": Role.MANAGE_MODELS,
        "GetModel": None,
        "ListModels": None,
    },
    "TrainerService": {
        "CreateJob": Role.MANAGE_JOBS,
        "CancelJob": Role.MANAGE_JOBS,
        "ResumeJob": Role.MANAGE_JOBS,
        "GetJob": None,
        "ListJobs": None,
        "WatchJob": None,
    },
    "WeightService": {
        "GetWeightState": None,
        "BeginPush": Role.PUSH_WEIGHTS,
        "PushChunks": Role.PUSH_WEIGHTS,
        "Stage": Role.PUSH_WEIGHTS,
        "Activate": Role.PUSH_WEIGHTS,
        "Rollback": Role.PUSH_WEIGHTS,
        "AbortPush": Role.PUSH_WEIGHTS,
    },
}
_OTHERS: Final[dict[str, dict[str, Role | None]]] = {
    "inference.GRPCInferenceService": {
        "ServerLive": None,
        "ServerReady": None,
        "ModelReady": None,
        "ServerMetadata": None,
        "ModelMetadata": None,
        "ModelInfer": Role.SCORE,
    },
    "tei.v1.Info": {"Info": None},
    "tei.v1.Predict": {
        "Predict": Role.SCORE,
        "PredictPair": Role.SCORE,
        "PredictStream": Role.SCORE,
        "PredictPairStream": Role.SCORE,
    },
}

ROLE_OF: Final[dict[str, Role | None]] = {
    f"/{service}/{method}": role
    for services in ({f"steersman.v1.{name}": methods for name, methods in _STEERSMAN.items()}, _OTHERS)
    for service, methods in services.items()
    for method, role in methods.items()
}
"""By the full path of the method; None: for every known caller."""
