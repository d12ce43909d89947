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

class WeightEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_ENCODING_UNSPECIFIED: _ClassVar[WeightEncoding]
    WEIGHT_ENCODING_DENSE: _ClassVar[WeightEncoding]
    WEIGHT_ENCODING_SPARSE_DELTA: _ClassVar[WeightEncoding]

class KvCachePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_CACHE_POLICY_UNSPECIFIED: _ClassVar[KvCachePolicy]
    KV_CACHE_POLICY_KEEP: _ClassVar[KvCachePolicy]
    KV_CACHE_POLICY_RECOMPUTE: _ClassVar[KvCachePolicy]
WEIGHT_ENCODING_UNSPECIFIED: WeightEncoding
WEIGHT_ENCODING_DENSE: WeightEncoding
WEIGHT_ENCODING_SPARSE_DELTA: WeightEncoding
KV_CACHE_POLICY_UNSPECIFIED: KvCachePolicy
KV_CACHE_POLICY_KEEP: KvCachePolicy
KV_CACHE_POLICY_RECOMPUTE: KvCachePolicy

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: _types_pb2.DataType
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[_types_pb2.DataType, str]] = ...) -> None: ...

class WeightManifest(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class WeightSnapshot(_message.Message):
    __slots__ = ("version", "digest", "activate_time")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACTIVATE_TIME_FIELD_NUMBER: _ClassVar[int]
    version: _types_pb2.WeightVersion
    digest: bytes
    activate_time: _timestamp_pb2.Timestamp
    def __init__(self, version: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ..., digest: _Optional[bytes] = ..., activate_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetWeightStateRequest(_message.Message):
    __slots__ = ("include_manifest",)
    INCLUDE_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    include_manifest: bool
    def __init__(self, include_manifest: bool = ...) -> None: ...

class GetWeightStateResponse(_message.Message):
    __slots__ = ("active", "staged", "previous", "pushing", "manifest", "total_bytes")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PUSHING_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    active: WeightSnapshot
    staged: WeightSnapshot
    previous: WeightSnapshot
    pushing: _types_pb2.WeightVersion
    manifest: WeightManifest
    total_bytes: int
    def __init__(self, active: _Optional[_Union[WeightSnapshot, _Mapping]] = ..., staged: _Optional[_Union[WeightSnapshot, _Mapping]] = ..., previous: _Optional[_Union[WeightSnapshot, _Mapping]] = ..., pushing: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ..., manifest: _Optional[_Union[WeightManifest, _Mapping]] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class BeginPushRequest(_message.Message):
    __slots__ = ("version", "base_version", "manifest", "partial", "idle_timeout", "digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: _types_pb2.WeightVersion
    base_version: _types_pb2.WeightVersion
    manifest: WeightManifest
    partial: bool
    idle_timeout: _duration_pb2.Duration
    digest: bytes
    def __init__(self, version: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ..., base_version: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ..., manifest: _Optional[_Union[WeightManifest, _Mapping]] = ..., partial: bool = ..., idle_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class BeginPushResponse(_message.Message):
    __slots__ = ("push_id", "max_chunk_bytes", "already_active")
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALREADY_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    push_id: str
    max_chunk_bytes: int
    already_active: bool
    def __init__(self, push_id: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ..., already_active: bool = ...) -> None: ...

class WeightChunk(_message.Message):
    __slots__ = ("tensor_index", "element_offset", "num_elements", "encoding", "data", "checksum")
    TENSOR_INDEX_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NUM_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    tensor_index: int
    element_offset: int
    num_elements: int
    encoding: WeightEncoding
    data: bytes
    checksum: int
    def __init__(self, tensor_index: _Optional[int] = ..., element_offset: _Optional[int] = ..., num_elements: _Optional[int] = ..., encoding: _Optional[_Union[WeightEncoding, str]] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class RelayHop(_message.Message):
    __slots__ = ("target", "push_id", "next")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    target: str
    push_id: str
    next: _containers.RepeatedCompositeFieldContainer[RelayHop]
    def __init__(self, target: _Optional[str] = ..., push_id: _Optional[str] = ..., next: _Optional[_Iterable[_Union[RelayHop, _Mapping]]] = ...) -> None: ...

class PushChunksRequest(_message.Message):
    __slots__ = ("push_id", "chunk", "relay")
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    push_id: str
    chunk: WeightChunk
    relay: _containers.RepeatedCompositeFieldContainer[RelayHop]
    def __init__(self, push_id: _Optional[str] = ..., chunk: _Optional[_Union[WeightChunk, _Mapping]] = ..., relay: _Optional[_Iterable[_Union[RelayHop, _Mapping]]] = ...) -> None: ...

class RelayReceipt(_message.Message):
    __slots__ = ("target", "status", "received_bytes", "num_chunks")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    target: str
    status: _types_pb2.ItemStatus
    received_bytes: int
    num_chunks: int
    def __init__(self, target: _Optional[str] = ..., status: _Optional[_Union[_types_pb2.ItemStatus, _Mapping]] = ..., received_bytes: _Optional[int] = ..., num_chunks: _Optional[int] = ...) -> None: ...

class PushChunksResponse(_message.Message):
    __slots__ = ("received_bytes", "num_chunks", "relayed")
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    RELAYED_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    num_chunks: int
    relayed: _containers.RepeatedCompositeFieldContainer[RelayReceipt]
    def __init__(self, received_bytes: _Optional[int] = ..., num_chunks: _Optional[int] = ..., relayed: _Optional[_Iterable[_Union[RelayReceipt, _Mapping]]] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ("push_id", "digest")
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    push_id: str
    digest: bytes
    def __init__(self, push_id: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class StageResponse(_message.Message):
    __slots__ = ("staged",)
    STAGED_FIELD_NUMBER: _ClassVar[int]
    staged: WeightSnapshot
    def __init__(self, staged: _Optional[_Union[WeightSnapshot, _Mapping]] = ...) -> None: ...

class ActivateRequest(_message.Message):
    __slots__ = ("version", "kv_cache_policy")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    version: _types_pb2.WeightVersion
    kv_cache_policy: KvCachePolicy
    def __init__(self, version: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ..., kv_cache_policy: _Optional[_Union[KvCachePolicy, str]] = ...) -> None: ...

class ActivateResponse(_message.Message):
    __slots__ = ("active", "pause", "num_running_requests")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    active: WeightSnapshot
    pause: _duration_pb2.Duration
    num_running_requests: int
    def __init__(self, active: _Optional[_Union[WeightSnapshot, _Mapping]] = ..., pause: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., num_running_requests: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("version", "kv_cache_policy")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    version: _types_pb2.WeightVersion
    kv_cache_policy: KvCachePolicy
    def __init__(self, version: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ..., kv_cache_policy: _Optional[_Union[KvCachePolicy, str]] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("active", "pause")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    active: WeightSnapshot
    pause: _duration_pb2.Duration
    def __init__(self, active: _Optional[_Union[WeightSnapshot, _Mapping]] = ..., pause: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class AbortPushRequest(_message.Message):
    __slots__ = ("push_id",)
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    push_id: str
    def __init__(self, push_id: _Optional[str] = ...) -> None: ...

class AbortPushResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
