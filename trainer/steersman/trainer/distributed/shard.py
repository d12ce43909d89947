"""Models sharded over ranks by FSDP2, and whole again.

Every layer is a unit: its parameters are gathered before it computes, forwards and backwards, and its gradients are
added up over the ranks into the shards. What is in no layer (embeddings, the last norm, the head) belongs to the root
unit.

A stage calls parts of a model rather than its `forward`, and multiplies by the head's weight itself. So the root is a
module around the model whose forward pass is whatever it is given: inside this `Scope` all parameters of the root
unit are whole.

Parameters are float32 shards and travel as such; the matrix products run under autocast, as in one process, so that
the numbers are those of one process. Gradients are *sums* over the ranks: the losses are normalised over the whole
batch already.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map

from steersman.trainer.distributed.world import Parts, Scope

T = TypeVar("T")


class _Root(nn.Module):
    """What FSDP sees as the model: any forward pass through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, forward: Callable[[], Any]) -> Any:
        """The result of `forward`: tensors, or tuples of them, as FSDP looks for what is differentiated.

        None of them is a view: FSDP could lose its hook on one.
        """
        return tree_map(_no_view, forward())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model: what its class says is to stay in one piece, where it stands in a list. All
    that it has are parameters of its own, which no tied embedding is.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [layer for layers in lists for layer in layers if type(layer).__name__ in names]


def _no_view(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value._is_view() else value


def shard(model: nn.Module, mesh: DeviceMesh, parts: Parts | None = None) -> Scope[Any]:
    """Shards `model` in place over `mesh` and moves each shard to its device; gives the scope of its forward passes.

    To be called on a model on the CPU, the same on every rank: a layer is on the device only as its shard. With
    `parts` its parameters may be on the meta device, and each rank reads its shards from there: nobody ever holds the
    model. Optimizers are to be made afterwards, from the shards.
    """
    root = _Root(model)
    held = {name: tensor.detach() for name, tensor in _tensors(model) if not tensor.is_meta} if parts else {}
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    # Nothing is whole outside of a pass: not what a checkpoint reads, nor what the optimizer has just changed.
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Plain sums, which gloo has too.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    if parts is not None:
        root.to_empty(device=mesh.device_type)
        for name, tensor in _tensors(model):
            if name in held:
                assign(tensor, held.pop(name))
        fill(model, parts)
    return cast("Scope[Any]", root)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def fill(model: nn.Module, parts: Parts) -> None:
    """Puts what `parts` have into `model`, whole or sharded, one tensor at a time. No collective."""
    for name, tensor in _tensors(model):
        if name not in parts:
            continue
        local, start = (tensor.to_local(), _first_row(tensor)) if isinstance(tensor, DTensor) else (tensor, 0)
        local.copy_(parts.rows(name, start, start + (len(local) if local.ndim else 1)))


def _first_row(tensor: DTensor) -> int:
    """The first row of this rank's shard. FSDP2 cuts as torch.chunk does, so the last ranks may have fewer, or none."""
    assert tensor.placements == (Shard(0),), f"placed as {tensor.placements}"
    num_rows, (size, rank) = tensor.shape[0], (tensor.device_mesh.size(), tensor.device_mesh.get_local_rank())
    return min(num_rows, -(-num_rows // size) * rank)


def whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor gathered from its shards, one at a time, on its device. A collective where there are shards."""
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Puts the whole `value` into `target`, of which this rank may hold a shard. No collective: every rank has the
    value.
    """
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        shards = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shards.to_local())
    else:
        target.copy_(value)
