"""Sharded tensors on disk, by torch.distributed.checkpoint: written by any number of ranks, read by any other.

    shards/shard-00001-model-00001-of-00001.safetensors    the shards of rank 0, each with its place in the whole tensor
    shards/shard-00002-model-00001-of-00001.safetensors    those of rank 1

The files are the safetensors of torch's Hugging Face storage, and say of themselves what they hold. Its planners work
out which parts of which file a rank needs. Its ranks would pickle their plans to agree on them, so here each plans
for itself: what it holds is its own on writing, and the files say everything on reading.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from steersman.trainer.checkpoint.atomic import CheckpointError

FOLDER: Final = "shards"


class _RankWriter(HuggingFaceStorageWriter):
    """Writes the file of one rank; the library would number it by a plan that all ranks agreed on."""

    def __init__(self, directory: Path, *, rank: int) -> None:
        super().__init__(str(directory), save_distributed=True)
        self._rank = rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data={"shard_index": self._rank + 1}) for plan in plans]


def has_shards(directory: Path) -> bool:
    """True if several ranks wrote the checkpoint in `directory`."""
    return (directory / FOLDER).is_dir()


def write_shards(directory: Path, tensors: Mapping[str, Tensor], *, rank: int) -> None:
    """Writes this rank's part of `tensors` into the folder `FOLDER` of `directory`, and has it on disk when it returns.

    Each rank gives all sharded tensors, and one of them those that are whole. No collective.
    """
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    held = {name: tensor.detach() for name, tensor in tensors.items()}
    with _alone():
        save(held, storage_writer=_RankWriter(folder, rank=rank), no_dist=True)


def read_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors`, whole or sharded, in place, from what any number of ranks wrote. No collective.

    CheckpointError if one is missing or has another shape.
    """
    wanted = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        with _alone():
            load(wanted, storage_reader=HuggingFaceStorageReader(str(directory / FOLDER)), no_dist=True)
    except CheckpointException as error:
        reasons = "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
        raise CheckpointError(f"the shards in {directory / FOLDER} do not fit: {reasons}") from error


class _alone(warnings.catch_warnings):  # noqa: N801 - reads as a statement
    """No warning that ranks do not plan together: they shall not."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
