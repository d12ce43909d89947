"""Trainer state (optimizer moments, counters, random states) as safetensors and JSON, bit for bit.

Any tree of dicts, lists, tuples, tensors, numbers, strings, booleans and None goes in and comes out equal:
tensors into ``state.safetensors``, the tree into ``state.json``. What JSON cannot say is tagged: tensors,
tuples, dicts whose keys are not all strings, and numbers that are not finite.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman.trainer.checkpoint.atomic import CheckpointError

TENSORS_FILE = "state.safetensors"
TREE_FILE = "state.json"
_TAG = "$"


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` into ``directory`` (which exists). TypeError names the place of a value that cannot be
    kept.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    save_file(tensors, directory / TENSORS_FILE)
    (directory / TREE_FILE).write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")


def load_state(directory: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, tensors on the CPU. CheckpointError if a file is missing or broken."""
    try:
        tensors = load_file(directory / TENSORS_FILE)
        tree = json.loads((directory / TREE_FILE).read_text(encoding="utf-8"))
        state = _decode(tree, tensors)
    except Exception as error:  # safetensors raises its own untyped errors for broken files
        raise CheckpointError(f"trainer state in {directory} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"trainer state in {directory} is no mapping")
    return state


def random_state() -> dict[str, Any]:
    """The state of every random generator that training draws from: Python's, torch's, and each CUDA
    device's.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Goes on from what :func:`random_state` gave; CUDA states are left out on a machine with another number
    of devices.
    """
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    cuda = state.get("cuda", [])
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory, and a view would drag its whole storage
        # along.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TAG: "tensor", "name": path}
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "float", "value": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _TAG not in value:
            return {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
        items = [[_encode(k, path, tensors), _encode(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {_TAG: "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot keep")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get(_TAG):
        case "tensor":
            return tensors[value["name"]]
        case "float":
            return float(value["value"])
        case "tuple":
            return tuple(_decode(item, tensors) for item in value["items"])
        case "dict":
            return {_decode(k, tensors): _decode(v, tensors) for k, v in value["items"]}
    return {key: _decode(item, tensors) for key, item in value.items()}
