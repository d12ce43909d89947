"""Weights before and after a real optimiser step."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

LEARNING_RATES = (1e-6, 3e-6, 1e-5)
_NUM_STEPS = 8
_VOCABULARY, _WIDTH, _HIDDEN = 1024, 256, 1024


class _Model(torch.nn.Module):
    """A next-token model with the shapes of a decoder: embedding, two gated blocks, norms, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(_VOCABULARY, _WIDTH)
        self.gates = torch.nn.ModuleList(torch.nn.Linear(_WIDTH, _HIDDEN, bias=False) for _ in range(2))
        self.outs = torch.nn.ModuleList(torch.nn.Linear(_HIDDEN, _WIDTH, bias=False) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(_WIDTH) for _ in range(2))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for gate, out, norm in zip(self.gates, self.outs, self.norms, strict=True):
            hidden = hidden + out(torch.nn.functional.silu(gate(norm(hidden))))
        return hidden @ self.embedding.weight.T


def _step_of(learning_rate: float) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Each tensor's float32 master before and after one AdamW step, late enough for steady moments."""
    torch.manual_seed(0)
    model = _Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    before: list[NDArray[np.float32]] = []
    for step in range(_NUM_STEPS):
        if step == _NUM_STEPS - 1:
            before = [parameter.detach().flatten().numpy().copy() for parameter in model.parameters()]
        tokens = torch.randint(_VOCABULARY, (8, 17))
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [parameter.detach().flatten().numpy().copy() for parameter in model.parameters()]
    return list(zip(before, after, strict=True))


def _as_bfloat16(master: NDArray[np.float32]) -> NDArray[np.uint16]:
    return torch.from_numpy(master).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(scope="session")
def master_steps() -> Mapping[float, list[tuple[NDArray[np.float32], NDArray[np.float32]]]]:
    """By learning rate: each tensor's float32 master before and after a step."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {learning_rate: _step_of(learning_rate) for learning_rate in LEARNING_RATES}
    finally:
        torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def bfloat16_steps(
    master_steps: Mapping[float, list[tuple[NDArray[np.float32], NDArray[np.float32]]]],
) -> Mapping[float, list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]]:
    """By learning rate: each tensor as served, raw bfloat16, before and after a step."""
    return {
        rate: [(_as_bfloat16(old), _as_bfloat16(new)) for old, new in pairs] for rate, pairs in master_steps.items()
    }
