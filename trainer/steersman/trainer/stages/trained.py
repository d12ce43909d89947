"""Models in training and their optimizers: on disk, and whole again from their shards.

One process writes models as Hugging Face files and optimizers into the trainer state; several write shards
(`checkpoint.shards`). Either is read by any number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steersman.trainer.checkpoint.models import load_weights, read_weights, write_model
from steersman.trainer.distributed.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Each model with its optimizer, by the name of its folder in a checkpoint; "" is the checkpoint's own."""

    world: World
    models: Mapping[str, PreTrainedModel]
    optimizers: Mapping[str, torch.optim.Optimizer]

    def state_dict(self) -> dict[str, Any]:
        """By name, what the trainer state keeps of an optimizer: everything, or for sharded ones the steps alone."""
        if self.world.size == 1:
            return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {name: {"steps": self._steps(name)} for name in self.models}

    def write(self, directory: Path) -> None:
        """Writes what the state does not keep into `directory`. A collective."""
        if self.world.size == 1:
            for name, model in self.models.items():
                (directory / name).mkdir(exist_ok=True)
                write_model(directory / name, model)
            return
        from steersman.trainer.checkpoint.shards import write_shards

        with self.world.long("writing its shards"):
            write_shards(directory, self._tensors(only_mine=True), rank=self.world.rank)
        self.world.barrier()

    def read(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Goes on from what `write` and `state_dict` gave, on whatever number of ranks. CheckpointError if it does
        not fit.
        """
        with self.world.long("reading a checkpoint"):
            self._read(directory, state)

    def _read(self, directory: Path, state: Mapping[str, Any]) -> None:
        if any("steps" in of_one for of_one in state.values()):
            from steersman.trainer.checkpoint.shards import read_shards

            for name in self.models:
                self._make_moments(name, state[name]["steps"])
            read_shards(directory, self._tensors())
            return
        for name, model in self.models.items():
            if self.world.size == 1:
                load_weights(model, directory / name)
                self.optimizers[name].load_state_dict(state[name])
            else:
                self._share_out(name, read_weights(model, directory / name), state[name])

    def whole(self, name: str) -> PreTrainedModel | None:
        """The model with all its weights: itself in one process, else a copy on the lead's CPU, None elsewhere. A
        collective.
        """
        model = self.models[name]
        if self.world.size == 1:
            return model
        from steersman.trainer.distributed.shard import whole

        kept: dict[str, Tensor] = {}
        for key, tensor in whole(_weights(model)):
            self.world.note(f"gathering {key}")
            if self.world.is_lead:
                kept[key] = tensor.to("cpu", copy=True)
        if not self.world.is_lead:
            return None
        with torch.device("meta"):
            copied: PreTrainedModel = type(model)(model.config)
        copied.load_state_dict(kept, strict=False, assign=True)
        copied.tie_weights()
        if model.can_generate():
            copied.generation_config = model.generation_config
        copied.eval()
        return copied

    def _tensors(self, *, only_mine: bool = False) -> dict[str, Tensor]:
        """Weights and moments by name; with `only_mine`, whole ones on the lead alone."""
        tensors: dict[str, Tensor] = {}
        for name, model in self.models.items():
            tensors |= {f"{name}/weight/{key}": tensor for key, tensor in _weights(model).items()}
            state = self.optimizers[name].state
            for key, parameter in model.named_parameters():
                if parameter in state:
                    tensors |= {f"{name}/{moment}/{key}": state[parameter][moment] for moment in _MOMENTS}
        if only_mine and not self.world.is_lead:
            return {name: tensor for name, tensor in tensors.items() if self.world.local(tensor) is not tensor}
        return tensors

    def _steps(self, name: str) -> dict[str, float]:
        state = self.optimizers[name].state
        return {
            key: float(state[parameter]["step"])
            for key, parameter in self.models[name].named_parameters()
            if parameter in state
        }

    def _make_moments(self, name: str, steps: Mapping[str, float]) -> None:
        optimizer = self.optimizers[name]
        optimizer.state.clear()
        for key, parameter in self.models[name].named_parameters():
            if key in steps:
                optimizer.state[parameter] = _moments_of(parameter, steps[key])

    def _share_out(self, name: str, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None:
        """Whole weights and moments into this rank's shards."""
        from steersman.trainer.distributed.shard import assign

        for key, target in _weights(self.models[name]).items():
            assign(target, weights[key])
        optimizer = self.optimizers[name]
        optimizer.state.clear()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, whole_state in optimizer_state["state"].items():
            parameter = parameters[int(number)]
            optimizer.state[parameter] = _moments_of(parameter, float(whole_state["step"]))
            for moment in _MOMENTS:
                assign(optimizer.state[parameter][moment], whole_state[moment])


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each under one of its names, as shards where they are sharded."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    known = {id(tensor) for tensor in tensors.values()}
    kept = model.state_dict(keep_vars=True)
    return tensors | {
        name: buffer for name, buffer in model.named_buffers() if name in kept and id(buffer) not in known
    }


def _moments_of(parameter: Tensor, step: float) -> dict[str, Tensor]:
    """AdamW's state of `parameter`, with moments of zero."""
    state = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in _MOMENTS}
    # Where the fused form keeps it.
    return {"step": torch.tensor(step, dtype=torch.float32, device=parameter.device), **state}
