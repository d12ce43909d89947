"""AdamW, its learning-rate schedule and gradient clipping, as settings and functions of the step alone."""

import math

import torch
from torch import Tensor, nn

from steersman.trainer.distributed.world import SOLO, World
from steersman.trainer.stages.settings import OptimizerConfig


def learning_rate_at(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of update ``step``, counted from 0, of ``total_steps``.

    Rises in a line to ``learning_rate`` over ``warmup_steps`` (the first update already moves), then stays, or falls in
    a line or half a cosine wave to ``final_share`` of it, which the last update has.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    progress = min(progress, 1.0)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_share + (1.0 - config.final_share) * left)


def build_optimizer(config: OptimizerConfig, *modules: nn.Module) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of ``modules``, each once; vectors (norms, biases) are not decayed."""
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,  # one pass over each tensor, on the CPU too
    )


def apply_update(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, *, step: int, total_steps: int, world: World = SOLO
) -> dict[str, float]:
    """Clips, updates, and clears the gradients. Gives ``lr`` and ``grad_norm`` (before clipping). A collective.

    FloatingPointError if the gradient norm is not finite: the weights are then as they were.
    """
    norm = grad_norm(optimizer, world)
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"the gradient norm is {norm} at step {step}: lower the learning rate or check the data"
        )
    if config.max_grad_norm is not None and norm > config.max_grad_norm:
        scale = config.max_grad_norm / norm
        torch._foreach_mul_(_gradients(optimizer, world), scale)
    rate = learning_rate_at(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"lr": rate, "grad_norm": norm}


def grad_norm(optimizer: torch.optim.Optimizer, world: World = SOLO) -> float:
    """The global L2 norm of all gradients, 0 without any. Where they are sharded, each rank has a part of each."""
    gradients = _gradients(optimizer, world)
    if not gradients:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if world.size == 1:
        return float(norm)
    square = norm.double().square()
    world.sum(square)
    return float(square.sqrt())


def _gradients(optimizer: torch.optim.Optimizer, world: World) -> list[Tensor]:
    return [world.local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
