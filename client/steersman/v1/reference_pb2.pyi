from steersman.v1 import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComputeLogprobsRequest(_message.Message):
    __slots__ = ("token_ids", "prompt_lengths", "temperature", "include_entropy")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    token_ids: _types_pb2.RaggedTensor
    prompt_lengths: _types_pb2.Tensor
    temperature: float
    include_entropy: bool
    def __init__(self, token_ids: _Optional[_Union[_types_pb2.RaggedTensor, _Mapping]] = ..., prompt_lengths: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., temperature: _Optional[float] = ..., include_entropy: bool = ...) -> None: ...

class ComputeLogprobsResponse(_message.Message):
    __slots__ = ("logprobs", "entropies", "model")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    logprobs: _types_pb2.RaggedTensor
    entropies: _types_pb2.RaggedTensor
    model: _types_pb2.ModelInfo
    def __init__(self, logprobs: _Optional[_Union[_types_pb2.RaggedTensor, _Mapping]] = ..., entropies: _Optional[_Union[_types_pb2.RaggedTensor, _Mapping]] = ..., model: _Optional[_Union[_types_pb2.ModelInfo, _Mapping]] = ...) -> None: ...

class ReferenceServiceGetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReferenceServiceGetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _types_pb2.ModelInfo
    def __init__(self, model: _Optional[_Union[_types_pb2.ModelInfo, _Mapping]] = ...) -> None: ...
