"""Our `WeightTransferEngine`: runs inside vLLM's worker and loads weights from a host copy in shared memory.

The frontend drives it with vLLM's own RPCs. On CPU: `start`, then `update` with "open", "load" for each
group of tensors, "pack" for each part, all between decode steps; then, inside a pause, `finish` swaps. On
other devices vLLM's layerwise reload writes into the live model, so all of it happens inside the pause.

Where workers are spread over several machines only the first of them sees the host copy; it hands it on.
"""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from steersman.policy.engine.shadow import ShadowModel

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing is needed to set up."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One step of an update.

    action: "open", "load", "pack", "restore" (the weights before the last swap) or "discard".
    path: file of the host copy; for "load".
    slots: [name, dtype, shape, offset_bytes] of each tensor to load; for "load".
    part, num_parts: which share of the modules to pack; for "pack".
    """

    action: str
    path: str = ""
    slots: list[tuple[str, str, list[int], int]] = field(default_factory=list)
    part: int = 0
    num_parts: int = 1


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads weights from shared host memory; see the module for the order of calls."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: "VllmConfig", device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._shadow: ShadowModel | None = None
        self._memory: dict[str, mmap.mmap] = {}
        self._swap_on_finish = False
        self._reloading = False
        self._spans_machines = vllm_config.parallel_config.nnodes > 1

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Builds the shadow ahead of the first update, which then costs no pause."""
        if self.device.type == "cpu":
            self._shadow = ShadowModel(live=self.model, vllm_config=self.vllm_config, model_config=self.model_config)

    def start_weight_update(self) -> None:
        """Opens a session; what it does is said by the first update."""
        self._swap_on_finish = False
        self._reloading = False

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        """Does one step of the update. Raises `ValueError` for an unknown action."""
        with torch.no_grad():
            if self.device.type == "cpu":
                self._update_shadow(update_info)
            else:
                self._update_in_place(update_info)

    def finish_weight_update(self) -> None:
        """Swaps (CPU) or completes the reload (other devices). Call it only while no step runs."""
        if self._swap_on_finish:
            self._require_shadow().swap()
        if self._reloading:
            finalize_layerwise_reload(self.model, self.model_config)
        self._swap_on_finish = self._reloading = False

    def shutdown(self) -> None:
        """Drops the shadow and the mappings."""
        self._shadow = None
        self._memory.clear()

    def _update_shadow(self, info: HostUpdateInfo) -> None:
        shadow = self._require_shadow()
        match info.action:
            case "open":
                shadow.open()
            case "load":
                shadow.load(self._tensors(info))
            case "pack":
                shadow.pack(info.part, info.num_parts)
                self._swap_on_finish = info.part == info.num_parts - 1
            case "restore":
                shadow.restore()
                self._swap_on_finish = True
            case "discard":
                shadow.discard()
                self._swap_on_finish = False
            case _:
                raise ValueError(f"action: got {info.action!r}")

    def _update_in_place(self, info: HostUpdateInfo) -> None:
        match info.action:
            case "open":
                initialize_layerwise_reload(self.model)
                self._reloading = True
            case "load":
                on_device = ((name, tensor.to(self.device)) for name, tensor in self._tensors(info))
                self.model.load_weights(on_device)  # type: ignore[operator]
            case "pack":
                pass  # finalising the reload packs
            case _:
                raise ValueError(f"action: got {info.action!r}, which exists on CPU only")

    def _require_shadow(self) -> ShadowModel:
        if self._shadow is None:
            raise RuntimeError("weight transfer was not initialised")
        return self._shadow

    def _tensors(self, info: HostUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        if self._spans_machines:
            yield from self._shared_tensors(info)
            return
        memory = self._map(info.path)
        for name, dtype, shape, offset in info.slots:
            yield name, _view(memory, getattr(torch, dtype), shape, offset)

    def _shared_tensors(self, info: HostUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        """The same where the host copy is on another machine for some: worker 0 has it, and sends all of it to all.
        Each takes its share by the model's own loaders. Every worker must go through all of them.
        """
        world = get_world_group()
        memory = self._map(info.path) if world.rank_in_group == 0 else None
        for name, dtype, shape, offset in info.slots:
            element: torch.dtype = getattr(torch, dtype)
            if memory is not None:
                tensor = _view(memory, element, shape, offset).to(self.device, copy=True)
            else:
                tensor = torch.empty(shape, dtype=element, device=self.device)
            # As bytes: not every element type of weights is one of collectives.
            raw = tensor.reshape(-1).view(torch.uint8)
            torch.distributed.broadcast(raw, src=world.ranks[0], group=world.device_group)
            yield name, tensor

    def _map(self, path: str) -> mmap.mmap:
        if path not in self._memory:
            # Read only by intent; torch warns about buffers that it could not write to.
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._memory[path] = mmap.mmap(file, 0)
            finally:
                os.close(file)
        return self._memory[path]


def _view(memory: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> torch.Tensor:
    num_elements = 1
    for size in shape:
        num_elements *= size
    if num_elements == 0:
        return torch.empty(shape, dtype=dtype)
    buffer: Any = memory
    return torch.frombuffer(buffer, dtype=dtype, count=num_elements, offset=offset).view(shape)
