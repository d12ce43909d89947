import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from steersman.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Overlength(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVERLENGTH_UNSPECIFIED: _ClassVar[Overlength]
    OVERLENGTH_FAIL: _ClassVar[Overlength]
    OVERLENGTH_TRUNCATE_PROMPT: _ClassVar[Overlength]

class PriorityClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_CLASS_UNSPECIFIED: _ClassVar[PriorityClass]
    PRIORITY_CLASS_INTERACTIVE: _ClassVar[PriorityClass]
    PRIORITY_CLASS_BULK: _ClassVar[PriorityClass]

class ScorerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORER_KIND_UNSPECIFIED: _ClassVar[ScorerKind]
    SCORER_KIND_MODEL: _ClassVar[ScorerKind]
    SCORER_KIND_FUNCTION: _ClassVar[ScorerKind]
    SCORER_KIND_ENSEMBLE: _ClassVar[ScorerKind]
OVERLENGTH_UNSPECIFIED: Overlength
OVERLENGTH_FAIL: Overlength
OVERLENGTH_TRUNCATE_PROMPT: Overlength
PRIORITY_CLASS_UNSPECIFIED: PriorityClass
PRIORITY_CLASS_INTERACTIVE: PriorityClass
PRIORITY_CLASS_BULK: PriorityClass
SCORER_KIND_UNSPECIFIED: ScorerKind
SCORER_KIND_MODEL: ScorerKind
SCORER_KIND_FUNCTION: ScorerKind
SCORER_KIND_ENSEMBLE: ScorerKind

class TokenPair(_message.Message):
    __slots__ = ("prompt", "response")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    prompt: _types_pb2.TokenIds
    response: _types_pb2.TokenIds
    def __init__(self, prompt: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ..., response: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class TextPair(_message.Message):
    __slots__ = ("prompt", "response")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    response: str
    def __init__(self, prompt: _Optional[str] = ..., response: _Optional[str] = ...) -> None: ...

class ChatPair(_message.Message):
    __slots__ = ("prompt", "response")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    prompt: _types_pb2.Chat
    response: _types_pb2.ChatMessage
    def __init__(self, prompt: _Optional[_Union[_types_pb2.Chat, _Mapping]] = ..., response: _Optional[_Union[_types_pb2.ChatMessage, _Mapping]] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("id", "tokens", "text", "chat", "context", "timeout")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    id: str
    tokens: TokenPair
    text: TextPair
    chat: ChatPair
    context: _struct_pb2.Struct
    timeout: _duration_pb2.Duration
    def __init__(self, id: _Optional[str] = ..., tokens: _Optional[_Union[TokenPair, _Mapping]] = ..., text: _Optional[_Union[TextPair, _Mapping]] = ..., chat: _Optional[_Union[ChatPair, _Mapping]] = ..., context: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ScoreOptions(_message.Message):
    __slots__ = ("scorer", "overlength", "priority", "include_raw")
    SCORER_FIELD_NUMBER: _ClassVar[int]
    OVERLENGTH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_RAW_FIELD_NUMBER: _ClassVar[int]
    scorer: str
    overlength: Overlength
    priority: PriorityClass
    include_raw: bool
    def __init__(self, scorer: _Optional[str] = ..., overlength: _Optional[_Union[Overlength, str]] = ..., priority: _Optional[_Union[PriorityClass, str]] = ..., include_raw: bool = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("items", "options")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    options: ScoreOptions
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ...) -> None: ...

class MemberScore(_message.Message):
    __slots__ = ("scorer", "status", "score", "weight", "revision", "model", "raw_score", "length_penalty")
    SCORER_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RAW_SCORE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    scorer: str
    status: _types_pb2.ItemStatus
    score: float
    weight: float
    revision: str
    model: str
    raw_score: float
    length_penalty: float
    def __init__(self, scorer: _Optional[str] = ..., status: _Optional[_Union[_types_pb2.ItemStatus, _Mapping]] = ..., score: _Optional[float] = ..., weight: _Optional[float] = ..., revision: _Optional[str] = ..., model: _Optional[str] = ..., raw_score: _Optional[float] = ..., length_penalty: _Optional[float] = ...) -> None: ...

class ItemScore(_message.Message):
    __slots__ = ("id", "status", "score", "raw_score", "members", "spread", "truncated", "num_tokens", "scorer", "revision", "model", "length_penalty")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RAW_SCORE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: _types_pb2.ItemStatus
    score: float
    raw_score: float
    members: _containers.RepeatedCompositeFieldContainer[MemberScore]
    spread: float
    truncated: bool
    num_tokens: int
    scorer: str
    revision: str
    model: str
    length_penalty: float
    def __init__(self, id: _Optional[str] = ..., status: _Optional[_Union[_types_pb2.ItemStatus, _Mapping]] = ..., score: _Optional[float] = ..., raw_score: _Optional[float] = ..., members: _Optional[_Iterable[_Union[MemberScore, _Mapping]]] = ..., spread: _Optional[float] = ..., truncated: bool = ..., num_tokens: _Optional[int] = ..., scorer: _Optional[str] = ..., revision: _Optional[str] = ..., model: _Optional[str] = ..., length_penalty: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ItemScore]
    def __init__(self, results: _Optional[_Iterable[_Union[ItemScore, _Mapping]]] = ...) -> None: ...

class StreamScoreRequest(_message.Message):
    __slots__ = ("options", "items")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    options: ScoreOptions
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    def __init__(self, options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ...) -> None: ...

class StreamScoreResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ItemScore]
    def __init__(self, results: _Optional[_Iterable[_Union[ItemScore, _Mapping]]] = ...) -> None: ...

class ListScorersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Scorer(_message.Message):
    __slots__ = ("name", "kind", "model", "members", "is_default")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: ScorerKind
    model: _types_pb2.ModelInfo
    members: _containers.RepeatedScalarFieldContainer[str]
    is_default: bool
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[ScorerKind, str]] = ..., model: _Optional[_Union[_types_pb2.ModelInfo, _Mapping]] = ..., members: _Optional[_Iterable[str]] = ..., is_default: bool = ...) -> None: ...

class ListScorersResponse(_message.Message):
    __slots__ = ("scorers",)
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    scorers: _containers.RepeatedCompositeFieldContainer[Scorer]
    def __init__(self, scorers: _Optional[_Iterable[_Union[Scorer, _Mapping]]] = ...) -> None: ...
