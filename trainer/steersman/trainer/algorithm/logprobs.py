"""Log-probability of the tokens that were taken, and entropy, without a float32 ``[tokens, vocabulary]`` of
the whole batch.

The distribution is ``softmax(z / temperature)`` with ``z`` the logits, as the sampling engine uses it.

Tokens go through the head in chunks. At most ``chunk_bytes`` of float32 logits are alive at a time; the
backward pass computes each chunk's logits again, except for what fits into ``keep_bytes``: probabilities of
the first chunks are kept up to that bound, because on small models the second matrix product costs more than
the memory is worth.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steersman.trainer.algorithm.products import matmul_nt

# Large enough for efficient matrix products; small enough that a chunk stays near the caches of a CPU.
CPU_CHUNK_BYTES = 8 << 20
ACCELERATOR_CHUNK_BYTES = 256 << 20
DEFAULT_KEEP_BYTES = 64 << 20
_FEW_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """``logprobs`` of the taken tokens in nats, float32, shaped as the targets; ``entropy`` of each
    distribution, or None.
    """

    logprobs: Tensor
    entropy: Tensor | None


def logprobs_from_hidden(
    hidden: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
    keep_bytes: int = DEFAULT_KEEP_BYTES,
) -> TokenLogprobs:
    """Log-probs of ``targets [...]`` under the head ``head_VD`` (and ``bias_V``) on ``hidden [..., D]``.

    ``hidden[i]`` is the state that *predicts* ``targets[i]``: the caller shifts. Differentiable in
    ``hidden``, ``head_VD`` and ``bias_V``, through the log-probs and through the entropy. The matrix product
    runs in the type that autocast asks for, else in that of ``hidden``; everything after it in float32.
    ValueError for a temperature that is not positive or shapes that do not fit; targets outside the
    vocabulary are an IndexError.
    """
    _require_positive_temperature(temperature)
    width = head_VD.shape[1]
    if hidden.shape[-1] != width or hidden.shape[:-1] != targets.shape:
        expected = (*targets.shape, width)
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, must be {expected} (targets', then head's width)")
    logprobs_T, entropy_T = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, width),
        head_VD,
        bias_V,
        targets.reshape(-1),
        temperature,
        with_entropy,
        _chunk_tokens(head_VD.shape[0], hidden.device, chunk_bytes),
        keep_bytes if torch.is_grad_enabled() else 0,
    )
    return TokenLogprobs(
        logprobs=logprobs_T.reshape(targets.shape),
        entropy=entropy_T.reshape(targets.shape) if with_entropy else None,
    )


@torch.no_grad()
def most_likely_tokens(
    hidden: Tensor, head_VD: Tensor, *, bias_V: Tensor | None = None, chunk_bytes: int | None = None
) -> Tensor:
    """The most likely next token at each of ``hidden [..., D]``: ids of the leading shape, in chunks of tokens too."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    ids_T = torch.empty(len(hidden_TD), dtype=torch.long, device=hidden.device)
    chunk_tokens = _chunk_tokens(head_VD.shape[0], hidden.device, chunk_bytes)
    for start in range(0, len(hidden_TD), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        ids_T[rows] = _chunk_logits(hidden_TD[rows], head_VD.to(hidden.dtype), bias_V, 1.0).argmax(dim=-1)
    return ids_T.reshape(hidden.shape[:-1])


def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> TokenLogprobs:
    """Log-probs of ``targets [...]`` under ``logits [..., V]``; a float32 copy exists of one chunk only.

    The gradient has the type and shape of ``logits``. Errors as for :func:`logprobs_from_hidden`.
    """
    _require_positive_temperature(temperature)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, must begin with targets' {tuple(targets.shape)}")
    vocabulary = logits.shape[-1]
    logprobs_T, entropy_T = _LogitsLogprobs.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, vocabulary),
        targets.reshape(-1),
        temperature,
        with_entropy,
        _chunk_tokens(vocabulary, logits.device, chunk_bytes),
    )
    return TokenLogprobs(
        logprobs=logprobs_T.reshape(targets.shape),
        entropy=entropy_T.reshape(targets.shape) if with_entropy else None,
    )


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_tokens: int,
        keep_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden_TD.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_TD.dtype
        num_tokens = len(hidden_TD)
        logprobs_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        entropy_T = torch.empty_like(logprobs_T) if with_entropy else logprobs_T.new_empty(0)
        keep = any(ctx.needs_input_grad[:3])
        kept: list[Tensor] = []
        with torch.autocast(device, enabled=False):
            compute_VD = head_VD.to(dtype)
            for start in range(0, num_tokens, chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                z_CV = _chunk_logits(hidden_TD[rows], compute_VD, bias_V, temperature)
                logprobs_C, entropy_C, log_p_CV = _log_softmax_stats(z_CV, targets_T[rows], with_entropy)
                logprobs_T[rows] = logprobs_C
                if entropy_C is not None:
                    entropy_T[rows] = entropy_C
                # Only ever a prefix of the chunks: backward finds a kept chunk by its number.
                keep = keep and keep_bytes >= log_p_CV.nbytes
                if keep:
                    keep_bytes -= log_p_CV.nbytes
                    # Backward needs log p for the entropy, and p alone without it.
                    kept.append(log_p_CV if with_entropy else log_p_CV.exp_())
        ctx.save_for_backward(hidden_TD, head_VD, bias_V, targets_T, entropy_T, *kept)
        ctx.temperature, ctx.with_entropy, ctx.chunk_tokens, ctx.dtype = (
            temperature,
            with_entropy,
            chunk_tokens,
            dtype,
        )
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_T: Tensor, grad_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, head_VD, bias_V, targets_T, entropy_T, *kept = ctx.saved_tensors
        need_hidden, need_head, need_bias = ctx.needs_input_grad[:3]
        grad_hidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
        # The sum over chunks is kept in float32: bfloat16 would drop the small late addends.
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            compute_VD = head_VD.to(ctx.dtype)
            for number, start in enumerate(range(0, len(hidden_TD), ctx.chunk_tokens)):
                rows = slice(start, start + ctx.chunk_tokens)
                hidden_CD = hidden_TD[rows].to(ctx.dtype)
                if number < len(kept):
                    known_CV = kept[number]
                else:
                    z_CV = _chunk_logits(hidden_CD, compute_VD, bias_V, ctx.temperature)
                    known_CV = torch.log_softmax(z_CV, dim=-1) if ctx.with_entropy else torch.softmax(z_CV, dim=-1)
                if ctx.with_entropy:
                    grad_CV = _grad_with_entropy(
                        known_CV, targets_T[rows], grad_logprobs_T[rows], grad_entropy_T[rows], entropy_T[rows]
                    )
                else:
                    grad_CV = _grad(known_CV, targets_T[rows], grad_logprobs_T[rows])
                grad_CV /= ctx.temperature
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(ctx.dtype)
                if grad_hidden_TD is not None:
                    grad_hidden_TD[rows] = matmul_nt(grad_CV, compute_VD.T).to(hidden_TD.dtype)
                if grad_head_VD is not None:
                    _add_product(grad_head_VD, grad_CV, hidden_CD)
        return (
            grad_hidden_TD,
            None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype),
            None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None,) * 5,
        )


class _LogitsLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        targets_T: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs_T = torch.empty(len(logits_TV), dtype=torch.float32, device=logits_TV.device)
        entropy_T = torch.empty_like(logprobs_T) if with_entropy else logprobs_T.new_empty(0)
        for start in range(0, len(logits_TV), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            z_CV = logits_TV[rows].float() / temperature
            logprobs_T[rows], entropy_C, _ = _log_softmax_stats(z_CV, targets_T[rows], with_entropy)
            if entropy_C is not None:
                entropy_T[rows] = entropy_C
        ctx.save_for_backward(logits_TV, targets_T, entropy_T)
        ctx.temperature, ctx.with_entropy, ctx.chunk_tokens = temperature, with_entropy, chunk_tokens
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_T: Tensor, grad_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, targets_T, entropy_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for start in range(0, len(logits_TV), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            z_CV = logits_TV[rows].float() / ctx.temperature
            if ctx.with_entropy:
                log_p_CV = torch.log_softmax(z_CV, dim=-1)
                grad_CV = _grad_with_entropy(
                    log_p_CV, targets_T[rows], grad_logprobs_T[rows], grad_entropy_T[rows], entropy_T[rows]
                )
            else:
                grad_CV = _grad(torch.softmax(z_CV, dim=-1), targets_T[rows], grad_logprobs_T[rows])
            grad_TV[rows] = (grad_CV / ctx.temperature).to(grad_TV.dtype)
        return grad_TV, *(None,) * 4


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """``total += grad.T @ hidden``, in float32."""
    if grad_CV.dtype == torch.float32 and len(grad_CV) < _FEW_ROWS:
        # Few rows make little work for each entry of the total: a separate sum would cost more than it wins.
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD += matmul_nt(grad_CV.T, hidden_CD.T)


def _chunk_logits(hidden_CD: Tensor, head_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    z_CV = matmul_nt(hidden_CD.to(head_VD.dtype), head_VD).float()
    if bias_V is not None:
        z_CV += bias_V.float()
    if temperature != 1.0:
        z_CV /= temperature
    return z_CV


def _log_softmax_stats(z_CV: Tensor, targets_C: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    log_p_CV = torch.log_softmax(z_CV, dim=-1)
    logprobs_C = log_p_CV.gather(1, targets_C[:, None]).squeeze(1)
    entropy_C = -(log_p_CV.exp().mul_(_finite(log_p_CV))).sum(dim=-1) if with_entropy else None
    return logprobs_C, entropy_C, log_p_CV


def _grad(p_CV: Tensor, targets_C: Tensor, grad_C: Tensor) -> Tensor:
    """Gradient with respect to ``z / temperature``: ``d log p_a / dz_j = [a = j] - p_j``. Overwrites ``p_CV``."""
    return p_CV.mul_(-grad_C[:, None]).scatter_add_(1, targets_C[:, None], grad_C[:, None])


def _grad_with_entropy(
    log_p_CV: Tensor, targets_C: Tensor, grad_C: Tensor, grad_entropy_C: Tensor, entropy_C: Tensor
) -> Tensor:
    """As :func:`_grad`, with the entropy's gradient ``d H / dz_j = -p_j (log p_j + H)`` added."""
    pull_CV = _finite(log_p_CV).add_(entropy_C[:, None]).mul_(grad_entropy_C[:, None]).add_(grad_C[:, None])
    return log_p_CV.exp().mul_(pull_CV.neg_()).scatter_add_(1, targets_C[:, None], grad_C[:, None])


def _finite(log_p: Tensor) -> Tensor:
    """A forbidden token (logit -inf) has p = 0, and 0 times a large number is 0; 0 times infinity is NaN."""
    return log_p.clamp(min=torch.finfo(torch.float32).min)


def _chunk_tokens(vocabulary: int, device: torch.device, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * vocabulary))


def _require_positive_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be above 0")
