"""Linear layers whose float32 products run through oneDNN on CPUs, forwards and backwards; see `algorithm.products`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steersman.serving import linear
from steersman.trainer.algorithm.products import matmul_nt


def speed_up(model: nn.Module) -> int:
    """Lets every plain float32 `nn.Linear` of `model` on a CPU compute through oneDNN; gives how many."""
    return linear.speed_up(model, OneDnnLinear)


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` whose three products run through oneDNN; falls back where they cannot (autocast, another
    type).
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`; shapes `[..., in]` to `[..., out]`."""
        if input.dtype != torch.float32 or input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        output: Tensor = _Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None
        return matmul_nt(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = matmul_nt(flat, weight.T).view(input.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = matmul_nt(flat.T, input.reshape(-1, input.shape[-1]).T)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_input, grad_weight, grad_bias
