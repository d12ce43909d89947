"""Final hidden states of padded rows, for models that cannot pack theirs."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Final hidden states ``[B, T, D]`` of *right-padded* ``ids_BT``, no cache kept.

    No attention mask is needed: under causal attention no real token sees the padding to its right, and
    without a mask the attention takes its fast causal form. States at padding are meaningless.
    """
    output = model.base_model(input_ids=ids_BT, use_cache=False)
    return cast(Tensor, output.last_hidden_state)


def hidden_states_at(model: PreTrainedModel, ids_BT: Tensor, positions_P: Tensor) -> Tensor:
    """What :func:`hidden_states` gives at the flat ``positions_P`` of ``ids_BT``: ``[P, D]``.

    The feed-forward block of the last layer, where the architecture has one in the usual place, computes these
    positions alone: what it gives elsewhere reaches no other token. Most of a batch are prompts, so that is most of its
    work, forwards and backwards.
    """
    layers = getattr(model.base_model, "layers", None)
    block = getattr(layers[-1], "mlp", None) if layers else None
    # Plain ones work token by token; a mixture of experts may not, and may give more than a tensor.
    plain = isinstance(block, nn.Module) and type(block).__name__.endswith("MLP")
    with _only_at(positions_P, ids_BT.shape, cast(nn.Module, block)) if plain else nullcontext():
        states_BTD = hidden_states(model, ids_BT)
    # index_select: its backward pass is one index_add, where boolean indexing would go element by element.
    return states_BTD.reshape(-1, states_BTD.shape[-1]).index_select(0, positions_P)


@contextmanager
def _only_at(positions_P: Tensor, shape_BT: torch.Size, block: nn.Module) -> Iterator[None]:
    """Has ``block`` compute some positions alone; its output is zero at the others."""

    def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].reshape(-1, args[0].shape[-1]).index_select(0, positions_P),)

    def put_back(_: nn.Module, args: tuple[Tensor], output_PD: Tensor) -> Tensor:
        zeros_TD = output_PD.new_zeros(shape_BT.numel(), output_PD.shape[-1])
        return zeros_TD.index_copy(0, positions_P, output_PD).view(*shape_BT, -1)

    hooks = block.register_forward_pre_hook(select), block.register_forward_hook(put_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
