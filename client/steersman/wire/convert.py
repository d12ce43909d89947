"""The plain identities of `wire.identity` to and from their messages."""

from steersman.v1 import types_pb2
from steersman.wire.identity import ModelInfo, VersionSpan, WeightVersion
from steersman.wire.tensors import dtype_from_name, dtype_name


def version_to_proto(version: WeightVersion) -> types_pb2.WeightVersion:
    """The message of a weight version."""
    return types_pb2.WeightVersion(run_id=version.run_id, step=version.step)


def version_from_proto(message: types_pb2.WeightVersion) -> WeightVersion:
    """The weight version of a message."""
    return WeightVersion(run_id=message.run_id, step=message.step)


def span_to_proto(span: VersionSpan) -> types_pb2.WeightVersionSpan:
    """The message of a version span."""
    return types_pb2.WeightVersionSpan(version=version_to_proto(span.version), start=span.start, end=span.end)


def span_from_proto(message: types_pb2.WeightVersionSpan) -> VersionSpan:
    """The version span of a message."""
    return VersionSpan(version=version_from_proto(message.version), start=message.start, end=message.end)


def model_to_proto(model: ModelInfo) -> types_pb2.ModelInfo:
    """The message of a model."""
    return types_pb2.ModelInfo(
        name=model.name,
        revision=model.revision,
        weight_version=version_to_proto(model.weight_version),
        vocab_size=model.vocab_size,
        max_sequence_tokens=model.max_sequence_tokens,
        dtype=dtype_from_name(model.dtype),
        eos_token_ids=model.eos_token_ids,
    )


def model_from_proto(message: types_pb2.ModelInfo) -> ModelInfo:
    """The model of a message."""
    return ModelInfo(
        name=message.name,
        revision=message.revision,
        weight_version=version_from_proto(message.weight_version),
        vocab_size=message.vocab_size,
        max_sequence_tokens=message.max_sequence_tokens,
        dtype=dtype_name(message.dtype),
        eos_token_ids=tuple(message.eos_token_ids),
    )
