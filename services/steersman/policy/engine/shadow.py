"""A second set of weights for a live vLLM model on CPU, filled between decode steps and swapped in by
pointer.

On CPU vLLM packs linear weights into oneDNN handles and empties the parameters, so nothing can be loaded
into the live model any more. The shadow is a twin of it: `open` gives the twin fresh parameters, `load`
fills them through the model's own weight loaders (fused and tied layouts stay vLLM's business), `pack` runs
the same post-processing that the live model went through, and `swap` exchanges the weights of twin and
model. Afterwards the twin holds the weights from before, so a second `swap` is the rollback.

Invariants: the live model is touched by `swap` alone, which only exchanges references and cannot fail
halfway; `swap` happens only after every parameter was loaded and packed.
"""

import copy
from collections.abc import Iterable
from enum import Enum, auto
from types import FunctionType
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

_NOT_WEIGHTS = frozenset({"kv_cache"})
"""Tensor attributes of modules that belong to running requests and must stay where they are."""


class _State(Enum):
    EMPTY = auto()
    LOADING = auto()
    READY = auto()
    PREVIOUS = auto()


class ShadowModel:
    """The twin of one live model; see the module for how it is used."""

    def __init__(self, *, live: nn.Module, vllm_config: VllmConfig, model_config: ModelConfig) -> None:
        self._live = live
        self._model_config = model_config
        self._twin = _build_twin(vllm_config, model_config)
        self._pairs = _pair_modules(live, self._twin)
        # One prototype for each distinct parameter; tied modules share an index and so stay tied.
        self._prototypes: list[torch.Tensor] = []
        self._places: list[tuple[nn.Module, str, int]] = []
        self._expected = {name for name, _ in self._twin.named_parameters()}
        self._capture_prototypes()
        self._loaded: set[str] = set()
        self._unpacked: list[list[nn.Module]] = []
        self._state = _State.EMPTY

    def _capture_prototypes(self) -> None:
        index_by_id: dict[int, int] = {}
        for module in self._twin.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in index_by_id:
                    index_by_id[id(parameter)] = len(self._prototypes)
                    self._prototypes.append(to_meta_tensor(parameter))
                self._places.append((module, name, index_by_id[id(parameter)]))
        for module, name, index in self._places:
            module._parameters[name] = self._prototypes[index]  # type: ignore[assignment]

    def open(self) -> None:
        """Gives the twin fresh, unfilled parameters. What it held before, the rollback target included, is
        gone.
        """
        fresh = [materialize_meta_tensor(prototype) for prototype in self._prototypes]
        for module, name, index in self._places:
            module._parameters[name] = fresh[index]  # type: ignore[assignment]
        self._loaded.clear()
        self._unpacked.clear()
        self._state = _State.LOADING

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fills parameters from tensors in Hugging Face names and shapes.

        Raises what the model's weight loaders raise for a name or a shape that they do not know.
        """
        self._require(_State.LOADING)
        loaded = self._twin.load_weights(tensors)  # type: ignore[operator]
        self._loaded |= set(loaded or ())

    def pack(self, part: int, num_parts: int) -> None:
        """Brings part `part` of `num_parts` of the modules into the layout that serves. Parts go in order,
        from 0.

        Raises `RuntimeError` on the first part when a parameter was never loaded.
        """
        self._require(_State.LOADING)
        if part == 0:
            self._require_complete()
            self._unpacked = _split([twin for _, twin in self._pairs], num_parts)
        if part + len(self._unpacked) != num_parts:
            raise RuntimeError(f"part: got {part} of {num_parts}, {len(self._unpacked)} parts are left")
        for module in self._unpacked.pop(0):
            quant_method = getattr(module, "quant_method", None)
            if isinstance(quant_method, QuantizeMethodBase):
                quant_method.process_weights_after_loading(module)
        if not self._unpacked:
            for _, module in self._pairs:
                if is_deferred_attention_layer(module):
                    module.process_weights_after_loading(self._model_config.dtype)  # type: ignore[operator]
            self._twin.eval()
            self._state = _State.READY

    def restore(self) -> None:
        """Makes the weights from before the last swap ready to be swapped in again."""
        self._require(_State.PREVIOUS)
        self._state = _State.READY

    def discard(self) -> None:
        """Forgets what was loaded since `open`. Keeps the weights from before if nothing was opened."""
        if self._state in (_State.LOADING, _State.READY):
            self._state = _State.EMPTY

    def swap(self) -> None:
        """Exchanges the weights of the live model and the twin. Call it only while no step runs."""
        self._require(_State.READY)
        for live, twin in self._pairs:
            for name in _weight_attributes(live) | _weight_attributes(twin):
                _exchange(live.__dict__, twin.__dict__, name)
        self._state = _State.PREVIOUS

    def _require(self, state: _State) -> None:
        if self._state is not state:
            have, want = self._state.name.lower(), state.name.lower()
            raise RuntimeError(f"shadow weights are {have}, expected {want}")

    def _require_complete(self) -> None:
        if missing := sorted(self._expected - self._loaded):
            raise RuntimeError(f"{len(missing)} parameters got no weights, the first is {missing[0]!r}")


def _build_twin(vllm_config: VllmConfig, model_config: ModelConfig) -> nn.Module:
    # Attention layers register themselves by name in the compilation config; the twin must not meet the
    # live ones.
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    dtype: Any = model_config.dtype
    with set_default_torch_dtype(dtype), torch.device("cpu"):
        twin: nn.Module = initialize_model(vllm_config=config, model_config=model_config)
    return twin


def _pair_modules(live: nn.Module, twin: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    live_modules, twin_modules = dict(live.named_modules()), dict(twin.named_modules())
    if live_modules.keys() != twin_modules.keys():
        odd = min(live_modules.keys() ^ twin_modules.keys())
        raise RuntimeError(f"live model and its twin differ in module {odd!r}")
    for name, module in live_modules.items():
        # Their packed experts live outside the module, where a swap would not reach them.
        if "FusedMoE" in type(module).__name__:
            raise RuntimeError(f"module {name!r}: mixture-of-experts weights cannot be swapped on CPU")
    # vLLM shares some weightless modules (rotary tables) between all models of a process.
    return [(module, twin_modules[name]) for name, module in live_modules.items() if module is not twin_modules[name]]


def _split(modules: list[nn.Module], num_parts: int) -> list[list[nn.Module]]:
    """Splits `modules` in order into parts of about the same number of elements."""
    sizes = [sum(p.numel() for p in module._parameters.values() if p is not None) for module in modules]
    total = max(1, sum(sizes))
    parts: list[list[nn.Module]] = [[] for _ in range(num_parts)]
    seen = 0
    for module, size in zip(modules, sizes, strict=True):
        parts[min(num_parts - 1, seen * num_parts // total)].append(module)
        seen += size
    return parts


def _weight_attributes(module: nn.Module) -> set[str]:
    """Attributes that hold weights or closures over packed weights (`cpu_linear`)."""
    held = {
        name
        for name, value in module.__dict__.items()
        if isinstance(value, torch.Tensor | FunctionType) and name not in _NOT_WEIGHTS
    }
    return held | {"_parameters", "_buffers"}


def _exchange(left: dict[str, Any], right: dict[str, Any], name: str) -> None:
    missing = object()
    left_value, right_value = left.pop(name, missing), right.pop(name, missing)
    if right_value is not missing:
        left[name] = right_value
    if left_value is not missing:
        right[name] = left_value
