"""Weights that a sharded trainer publishes: tensors that divide unevenly, of several tiles or of less than one."""

from functools import cache

import torch
from torch import Tensor

from steersman.policy.weights.manifest import HostManifest, TensorSpec
from steersman.trainer.weights.image import WeightImage
from steersman.wire.identity import WeightVersion

RUN = "demo.1"
SHAPES = {"embed": (1001, 700), "few": (2, 150_000), "norm": (7,), "scale": (), "void": (0, 3)}
TIED = "head"
"""Another name of `embed`."""
MANIFEST = HostManifest.of(TensorSpec(name=name, shape=shape, dtype="bfloat16") for name, shape in SHAPES.items())


def version(step: int) -> WeightVersion:
    return WeightVersion(run_id=RUN, step=step)


@cache
def tensors(step: int) -> dict[str, Tensor]:
    """float32, of which about two elements in a hundred move from each step to the next."""
    generator = torch.Generator().manual_seed(step)
    if step == 0:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made = {name: tensor.clone() for name, tensor in tensors(step - 1).items()}
    for tensor in made.values():
        tensor[torch.rand(tensor.shape, generator=generator) < 0.02] *= 1.01
    return made


def image(step: int) -> WeightImage:
    """As one process holds it."""
    made = tensors(step)
    return WeightImage(version(step), {**made, TIED: made["embed"]})


def host_bytes(step: int) -> bytes:
    """As they lie in a replica."""
    copy, made = bytearray(MANIFEST.nbytes), image(step)
    for slot in MANIFEST.slots:
        spec = next(spec for spec in MANIFEST.tensors if spec.name == slot.name)
        copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes] = made.elements(spec).tobytes()  # type: ignore[arg-type]
    return bytes(copy)
