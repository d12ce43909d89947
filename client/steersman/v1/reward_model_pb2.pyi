import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from steersman.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RewardModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REWARD_MODEL_STATE_UNSPECIFIED: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_LOADING: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_READY: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_FAILED: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_UNLOADING: _ClassVar[RewardModelState]
REWARD_MODEL_STATE_UNSPECIFIED: RewardModelState
REWARD_MODEL_STATE_LOADING: RewardModelState
REWARD_MODEL_STATE_READY: RewardModelState
REWARD_MODEL_STATE_FAILED: RewardModelState
REWARD_MODEL_STATE_UNLOADING: RewardModelState

class RewardModel(_message.Message):
    __slots__ = ("name", "source", "state", "error", "model", "scorers", "parameter_bytes", "num_items_in_flight", "state_time", "hub_revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ITEMS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    STATE_TIME_FIELD_NUMBER: _ClassVar[int]
    HUB_REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    state: RewardModelState
    error: str
    model: _types_pb2.ModelInfo
    scorers: _containers.RepeatedScalarFieldContainer[str]
    parameter_bytes: int
    num_items_in_flight: int
    state_time: _timestamp_pb2.Timestamp
    hub_revision: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., state: _Optional[_Union[RewardModelState, str]] = ..., error: _Optional[str] = ..., model: _Optional[_Union[_types_pb2.ModelInfo, _Mapping]] = ..., scorers: _Optional[_Iterable[str]] = ..., parameter_bytes: _Optional[int] = ..., num_items_in_flight: _Optional[int] = ..., state_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., hub_revision: _Optional[str] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("name", "source", "revision", "scorer", "switch_when_ready", "unload_previous", "allow_other_tokenizer")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    SWITCH_WHEN_READY_FIELD_NUMBER: _ClassVar[int]
    UNLOAD_PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OTHER_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    revision: str
    scorer: str
    switch_when_ready: bool
    unload_previous: bool
    allow_other_tokenizer: bool
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., revision: _Optional[str] = ..., scorer: _Optional[str] = ..., switch_when_ready: bool = ..., unload_previous: bool = ..., allow_other_tokenizer: bool = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: RewardModel
    def __init__(self, model: _Optional[_Union[RewardModel, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name", "wait")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    wait: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: RewardModel
    def __init__(self, model: _Optional[_Union[RewardModel, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[RewardModel]
    def __init__(self, models: _Optional[_Iterable[_Union[RewardModel, _Mapping]]] = ...) -> None: ...

class SwitchScorerRequest(_message.Message):
    __slots__ = ("scorer", "model", "allow_other_tokenizer")
    SCORER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OTHER_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    scorer: str
    model: str
    allow_other_tokenizer: bool
    def __init__(self, scorer: _Optional[str] = ..., model: _Optional[str] = ..., allow_other_tokenizer: bool = ...) -> None: ...

class SwitchScorerResponse(_message.Message):
    __slots__ = ("model", "previous")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    model: RewardModel
    previous: str
    def __init__(self, model: _Optional[_Union[RewardModel, _Mapping]] = ..., previous: _Optional[str] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: RewardModel
    def __init__(self, model: _Optional[_Union[RewardModel, _Mapping]] = ...) -> None: ...
