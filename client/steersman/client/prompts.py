"""Prompts, conversations and JSON facts to their messages. What is malformed raises INVALID_FIELD before it is sent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from google.protobuf import struct_pb2

from steersman.client.types import ChatMessage, Conversation, IntArray, Prompt, TokenIds
from steersman.v1 import types_pb2
from steersman.wire.errors import invalid_field

_MAX_INT32: Final = 2**31 - 1
# Struct holds doubles: larger whole numbers would change on the way.
_MAX_EXACT_INT: Final = 2**53


def token_array(ids: TokenIds, field: str) -> IntArray:
    """Token ids as int32[length]. Raises INVALID_FIELD for what is no list of ids in [0, 2**31)."""
    array = np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise invalid_field(field, ids, "a one-dimensional sequence of whole numbers")
    if int(array.min()) < 0 or int(array.max()) > _MAX_INT32:
        bad = array[(array < 0) | (array > _MAX_INT32)][0]
        raise invalid_field(field, int(bad), "token ids from 0 to 2**31 - 1")
    return array.astype(np.int32, copy=False)


def token_ids_to_proto(ids: TokenIds, field: str) -> types_pb2.TokenIds:
    """The message of token ids."""
    return types_pb2.TokenIds(ids=token_array(ids, field).tolist())


def message_to_proto(message: ChatMessage | Mapping[str, str], field: str) -> types_pb2.ChatMessage:
    """The message of one turn, given as dataclass or as mapping with exactly "role" and "content"."""
    turn = {"role": message.role, "content": message.content} if isinstance(message, ChatMessage) else message
    if set(turn) != {"role", "content"} or not all(isinstance(value, str) for value in turn.values()):
        raise invalid_field(field, dict(turn), "role and content, both text, and nothing else")
    return types_pb2.ChatMessage(role=turn["role"], content=turn["content"])


def is_conversation(prompt: object) -> bool:
    """True for a non-empty sequence of chat messages."""
    if isinstance(prompt, str | np.ndarray) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return isinstance(prompt[0], ChatMessage | Mapping)


def chat_to_proto(conversation: Conversation, field: str) -> types_pb2.Chat:
    """The message of a conversation."""
    turns = [message_to_proto(turn, f"{field}[{index}]") for index, turn in enumerate(conversation)]
    return types_pb2.Chat(messages=turns)


def prompt_to_proto(prompt: Prompt) -> dict[str, Any]:
    """The prompt as the one field of a GenerateRequest that holds its kind."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if is_conversation(prompt):
        return {"chat": chat_to_proto(prompt, "prompt")}  # type: ignore[arg-type]
    return {"prompt_token_ids": token_ids_to_proto(prompt, "prompt")}  # type: ignore[arg-type]


def _to_value(value: object, field: str) -> struct_pb2.Value:
    match value:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=value)
        case int() if abs(value) > _MAX_EXACT_INT:
            raise invalid_field(field, value, "whole numbers within 2**53 (write larger ones as text)")
        case float() if not math.isfinite(value):
            raise invalid_field(field, value, "finite numbers")
        case int() | float():
            return struct_pb2.Value(number_value=value)
        case str():
            return struct_pb2.Value(string_value=value)
        case Mapping():
            return struct_pb2.Value(struct_value=to_struct(value, field))
        case list() | tuple():
            items = [_to_value(item, f"{field}[{index}]") for index, item in enumerate(value)]
            return struct_pb2.Value(list_value=struct_pb2.ListValue(values=items))
    raise invalid_field(field, value, "JSON values: null, bool, number, text, list, mapping")


def to_struct(values: Mapping[str, Any], field: str) -> struct_pb2.Struct:
    """A mapping of JSON values as Struct. Raises INVALID_FIELD with the path of what is none."""
    struct = struct_pb2.Struct()
    for key, value in values.items():
        if not isinstance(key, str):
            raise invalid_field(field, key, "text keys")
        struct.fields[key].CopyFrom(_to_value(value, f"{field}.{key}"))
    return struct


def _from_value(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "bool_value":
            return value.bool_value
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "struct_value":
            return from_struct(value.struct_value)
        case "list_value":
            return [_from_value(item) for item in value.list_value.values]
    return None


def from_struct(struct: struct_pb2.Struct) -> dict[str, Any]:
    """The mapping of a Struct; whole numbers come back as int."""
    return {key: _from_value(value) for key, value in struct.fields.items()}
