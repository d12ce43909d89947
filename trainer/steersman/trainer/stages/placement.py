"""On which device a model trains, and in which type its matrix products run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from steersman.trainer.checkpoint.models import resolve_device
from steersman.trainer.distributed.world import Parts, Scope, World, direct
from steersman.trainer.stages.linear import speed_up
from steersman.trainer.stages.packed import let_pack
from steersman.trainer.stages.settings import DTypeSetting


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Weights and optimizer moments are always float32; ``bfloat16`` runs the forward and backward passes under
    autocast.
    """

    device: torch.device
    dtype: torch.dtype

    def move(self, model: PreTrainedModel, *, fast_linear: bool = True) -> PreTrainedModel:
        """Moves ``model`` there, in place, and gives it back; with ``fast_linear``, float32 layers on a CPU take their
        faster form.
        """
        nn.Module.to(model, self.device)
        let_pack(model)
        if fast_linear:
            speed_up(model)
        return model

    def settle(
        self, model: PreTrainedModel, world: World, parts: Parts | None = None, *, fast_linear: bool = True
    ) -> Scope[Any]:
        """Moves ``model``, which is on the CPU, there, or shards it over the ranks; gives the scope of its forward
        passes. Of several ranks each reads what has no values yet from ``parts``.
        """
        if world.size == 1:
            self.move(model, fast_linear=fast_linear)
            return direct
        let_pack(model)
        scope = world.shard(model, self.device.type, parts)
        if fast_linear and self.device.type == "cpu":
            speed_up(model)
        return scope

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def place(device: str, dtype: DTypeSetting) -> Placement:
    """``auto`` device: CUDA if there; ``auto`` type: bfloat16 on CUDA, else float32. ValueError for a device that is
    not there.
    """
    resolved = resolve_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if resolved.type == "cuda" else "float32"
    return Placement(device=resolved, dtype=getattr(torch, dtype))
