"""What a decoder layer does token by token, in two steps that are differentiated by hand; float32, on a CPU.

A step takes a thousand tokens or so at a time through all that it does, so that what lies between its products is not
there for all tokens at once; what is cheap to compute again (the norm, the gate's product) is not kept. Products of
weights run through oneDNN; gradients of weights are one product over all tokens.

Shape suffixes: `T` tokens, `D` width of the model, `E` outputs of the projections together, `F` width of the
feed-forward block, `C` tokens of a chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steersman.trainer.algorithm.products import matmul_nt

# Fewer would stay in the cache, but every operator costs some microseconds whatever its size.
_CHUNK_TOKENS = 1024


def project(
    states_TD: Tensor,
    norm_D: Tensor,
    epsilon: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    turn: tuple[Tensor, Tensor],
    num_turned: int,
) -> Tensor:
    """RMSNorm, then the linear layers `weights [*, D]` and `biases` (all or none), side by side: `[T, E]`.

    The first `num_turned` outputs are those of heads to which the rotary embedding `turn` is applied: cosines and sines
    `[T, size of a head]`, whose two halves are alike.
    """
    with_bias = [bias for bias in biases if bias is not None]
    assert len(with_bias) in (0, len(weights))
    output: Tensor = _Projection.apply(  # type: ignore[no-untyped-call]
        states_TD, norm_D, epsilon, *turn, num_turned, len(weights), *weights, *with_bias
    )
    return output


def feed_forward(
    states_TD: Tensor, norm_D: Tensor, epsilon: float, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor
) -> Tensor:
    """``states + (silu(n gate.T) * (n up.T)) down.T`` of the RMSNorm ``n`` of `states_TD`: `[T, D]`."""
    output: Tensor = _FeedForward.apply(states_TD, norm_D, epsilon, gate_FD, up_FD, down_DF)  # type: ignore[no-untyped-call]
    return output


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_TD: Tensor,
        norm_D: Tensor,
        epsilon: float,
        cos_TR: Tensor,
        sin_TR: Tensor,
        num_turned: int,
        num_weights: int,
        *parameters: Tensor,
    ) -> Tensor:
        weight_ED = torch.cat(parameters[:num_weights])
        bias_E = torch.cat(parameters[num_weights:]) if len(parameters) > num_weights else None
        scale_T1 = _scale(states_TD, epsilon)
        output_TE = states_TD.new_empty(len(states_TD), len(weight_ED))
        for rows in _chunks(len(states_TD)):
            normal_CD = (states_TD[rows] * scale_T1[rows]).mul_(norm_D)
            product_CE = matmul_nt(normal_CD, weight_ED, bias_E)
            _turn(product_CE, cos_TR[rows], sin_TR[rows], num_turned, into=output_TE[rows])
        ctx.save_for_backward(states_TD, norm_D, scale_T1, cos_TR, sin_TR, *parameters)
        ctx.num_turned, ctx.num_weights = num_turned, num_weights
        return output_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        states_TD, norm_D, scale_T1, cos_TR, sin_TR, *parameters = ctx.saved_tensors
        weights = parameters[: ctx.num_weights]
        weight_DE = torch.cat(weights).T
        turned_TE, normal_TD, grad_TD = (
            torch.empty_like(grad_TE),
            torch.empty_like(states_TD),
            torch.empty_like(states_TD),
        )
        grad_norm_D = torch.zeros_like(norm_D)
        for rows in _chunks(len(states_TD)):
            # The transpose of a turn is the turn back.
            _turn(grad_TE[rows], cos_TR[rows], sin_TR[rows].neg(), ctx.num_turned, into=turned_TE[rows])
            direction_CD = states_TD[rows] * scale_T1[rows]
            torch.mul(direction_CD, norm_D, out=normal_TD[rows])
            grad_normal_CD = matmul_nt(turned_TE[rows], weight_DE)
            _norm_backward(grad_normal_CD, direction_CD, scale_T1[rows], norm_D, grad_norm_D, into=grad_TD[rows])
        sizes = [len(weight) for weight in weights]
        grad_weights = torch.split(_weight_gradient(turned_TE, normal_TD), sizes)
        has_biases = len(parameters) > ctx.num_weights
        grad_biases = torch.split(turned_TE.sum(0), sizes) if has_biases else ()
        return grad_TD, grad_norm_D, *(None,) * 5, *grad_weights, *grad_biases


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_TD: Tensor,
        norm_D: Tensor,
        epsilon: float,
        gate_FD: Tensor,
        up_FD: Tensor,
        down_DF: Tensor,
    ) -> Tensor:
        both_GD = torch.cat([gate_FD, up_FD])
        scale_T1 = _scale(states_TD, epsilon)
        output_TD = torch.empty_like(states_TD)
        kept: list[Tensor] = []
        for rows in _chunks(len(states_TD)):
            normal_CD = (states_TD[rows] * scale_T1[rows]).mul_(norm_D)
            both_CG = matmul_nt(normal_CD, both_GD)
            gate_CF, up_CF = both_CG.chunk(2, -1)
            hidden_CF = torch.nn.functional.silu(gate_CF).mul_(up_CF)
            torch.add(states_TD[rows], matmul_nt(hidden_CF, down_DF), out=output_TD[rows])
            kept.append(both_CG)
        ctx.save_for_backward(states_TD, norm_D, scale_T1, gate_FD, up_FD, down_DF, *kept)
        return output_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        states_TD, norm_D, scale_T1, gate_FD, up_FD, down_DF, *kept = ctx.saved_tensors
        both_DG = torch.cat([gate_FD, up_FD]).T
        width, num_tokens = len(gate_FD), len(states_TD)
        hidden_TF, grad_both_TG = states_TD.new_empty(num_tokens, width), states_TD.new_empty(num_tokens, 2 * width)
        normal_TD, grad_TD = torch.empty_like(states_TD), torch.empty_like(states_TD)
        grad_norm_D = torch.zeros_like(norm_D)
        for rows, both_CG in zip(_chunks(num_tokens), kept, strict=True):
            gate_CF, up_CF = both_CG.chunk(2, -1)
            grad_gate_CF, grad_up_CF = grad_both_TG[rows].chunk(2, -1)
            grad_hidden_CF = matmul_nt(grad_out_TD[rows], down_DF.T)
            active_CF = torch.nn.functional.silu(gate_CF)
            torch.mul(active_CF, up_CF, out=hidden_TF[rows])
            torch.mul(grad_hidden_CF, active_CF, out=grad_up_CF)
            torch.ops.aten.silu_backward.grad_input(grad_hidden_CF.mul_(up_CF), gate_CF, grad_input=grad_gate_CF)
            direction_CD = states_TD[rows] * scale_T1[rows]
            torch.mul(direction_CD, norm_D, out=normal_TD[rows])
            grad_normal_CD = matmul_nt(grad_both_TG[rows], both_DG)
            _norm_backward(grad_normal_CD, direction_CD, scale_T1[rows], norm_D, grad_norm_D, into=grad_TD[rows])
            grad_TD[rows] += grad_out_TD[rows]
        grad_gate_FD, grad_up_FD = torch.split(_weight_gradient(grad_both_TG, normal_TD), width)
        return grad_TD, grad_norm_D, None, grad_gate_FD, grad_up_FD, _weight_gradient(grad_out_TD, hidden_TF)


def _chunks(num_tokens: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK_TOKENS) for start in range(0, num_tokens, _CHUNK_TOKENS))


def _weight_gradient(grad_TM: Tensor, input_TK: Tensor) -> Tensor:
    """`[M, K]`, the product taken so that the narrower of the two is the one to be turned around."""
    if grad_TM.shape[1] > input_TK.shape[1]:
        return matmul_nt(input_TK.T, grad_TM.T).T.contiguous()
    return matmul_nt(grad_TM.T, input_TK.T)


def _scale(states_TD: Tensor, epsilon: float) -> Tensor:
    """One over the root mean square of each token."""
    norms_T1 = torch.linalg.vector_norm(states_TD, dim=-1, keepdim=True)
    scale_T1: Tensor = norms_T1.square_().div_(states_TD.shape[-1]).add_(epsilon).rsqrt_()
    return scale_T1


def _norm_backward(
    grad_CD: Tensor, direction_CD: Tensor, scale_C1: Tensor, norm_D: Tensor, grad_norm_D: Tensor, *, into: Tensor
) -> None:
    """The gradient of RMSNorm's input, of that of its output (which is lost) and the normalised input."""
    along_CD = grad_CD * direction_CD
    grad_norm_D += along_CD.sum(0)
    mean_C1 = (along_CD @ norm_D)[:, None].div_(-grad_CD.shape[-1])
    grad_CD.mul_(norm_D).addcmul_(direction_CD, mean_C1)
    torch.mul(grad_CD, scale_C1, out=into)


def _turn(vectors_CE: Tensor, cos_CR: Tensor, sin_CR: Tensor, num_turned: int, *, into: Tensor) -> None:
    """Rotary position embedding of the first `num_turned` columns, heads as wide as `cos_CR`; copies the others."""
    size = cos_CR.shape[-1]
    half = size // 2
    cos_C1R, sin_C1r = cos_CR[:, None], sin_CR[:, None, :half]
    from_CHR, to_CHR = (part[:, :num_turned].view(len(part), -1, size) for part in (vectors_CE, into))
    torch.mul(from_CHR, cos_C1R, out=to_CHR)
    to_CHR[..., :half].addcmul_(from_CHR[..., half:], sin_C1r, value=-1)
    to_CHR[..., half:].addcmul_(from_CHR[..., :half], sin_C1r)
    into[:, num_turned:] = vectors_CE[:, num_turned:]
