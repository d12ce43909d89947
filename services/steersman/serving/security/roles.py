"""The role that each RPC asks for. Closed: an RPC without an entry is refused to everyone, and a test says so."""

from typing import Final

from steersman.wire.roles import Role

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
        "ReadJobLogs": Role.MANAGE_JOBS,
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
