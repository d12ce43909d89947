"""Float32 matrix products of a frozen model on CPUs, through oneDNN.

torch gives float32 products to MKL, which on some CPUs reaches less than half of what oneDNN does: 72 to 88 GFLOPS a
core against 157 to 200 on an AVX-512 EPYC, at 64 to 6,144 tokens and widths of 256 to 2,000. The operator is the one
that torch's compiler emits for a linear layer. Results are float32 throughout and differ by rounding only.
"""

import torch
from torch import Tensor, nn


def available() -> bool:
    """True if this build of torch has oneDNN and the operator."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def speed_up(model: nn.Module, kind: type[nn.Linear] | None = None) -> int:
    """Lets the plain float32 linear layers of `model` that are on a CPU compute through oneDNN; returns their number.

    They become layers of `kind`, a class without a state of its own; names and weights stay. By default
    `FrozenLinear`, for inference only.
    """
    if not available():
        return 0
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    layers = [layer for layer in layers if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32]
    for layer in layers:
        layer.__class__ = kind or FrozenLinear
    return len(layers)


class FrozenLinear(nn.Linear):
    """An `nn.Linear` for inference through oneDNN; computes as before where that does not apply."""

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`; shapes [..., in] to [..., out]."""
        applies = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if not applies or input.numel() == 0 or torch.is_grad_enabled():
            return super().forward(input)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return output
