"""Float32 matrix products of a training step on CPUs, through oneDNN.

torch sends float32 products to MKL, whose kernels leave two thirds and more of some CPUs unused (measured on an
AVX-512 EPYC at 1,536 tokens and widths of 256 to 1,024: 40 to 95 GFLOPS a core, against 140 to 220 with oneDNN, in
all three products of a layer). torch's own build of oneDNN offers the operator that its compiler emits; the result
is float32 throughout.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def available() -> bool:
    """True if this build of torch has oneDNN and the operator."""
    has_library: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_library and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def speed_up(model: nn.Module) -> int:
    """Lets every plain float32 `nn.Linear` of `model` on a CPU compute through oneDNN; gives how many. Names and
    weights stay.
    """
    if not available():
        return 0
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    layers = [layer for layer in layers if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32]
    for layer in layers:
        layer.__class__ = OneDnnLinear
    return len(layers)


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


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right.T + bias`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _product(flat, weight.t()).view(input.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(flat.t(), input.reshape(-1, input.shape[-1]).t())
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_input, grad_weight, grad_bias
