"""Versions of a tiny model, the same in every process that asks for them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from steersman.trainer.weights.image import WeightImage
from steersman.wire.identity import WeightVersion

_CHANGED_SHARE = 0.02


def tensors_of(folder: Path, version: WeightVersion) -> dict[str, Tensor]:
    """The weights of a version, by name. Step 0 is the checkpoint; each step moves a few elements, far enough to make
    other log-probs, and each attempt of a run moves others.
    """
    tensors = load_file(folder / "model.safetensors")
    for step in range(1, version.step + 1):
        generator = torch.Generator().manual_seed(1000 * version.attempt + step)
        for name in sorted(tensors):
            size = tensors[name].shape
            moved = torch.rand(size, generator=generator) < _CHANGED_SHARE
            tensors[name] = tensors[name] + moved * torch.randn(size, generator=generator)
    return tensors


def image_of(folder: Path, version: WeightVersion) -> WeightImage:
    """The same, ready to be published."""
    return WeightImage(version, tensors_of(folder, version))
