"""Shards as one process sees them; several are in the tests with real ranks."""

import json
import struct
from pathlib import Path

import pytest
import torch

from steersman.trainer.checkpoint.atomic import CheckpointError
from steersman.trainer.checkpoint.shards import FOLDER, has_shards, read_shards, write_shards


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "actor/weight/a": torch.randn(5, 3, generator=generator),
        "actor/exp_avg/a": torch.randn(5, 3, generator=generator).bfloat16(),
        "critic/weight/score": torch.randn(1, 4, generator=generator),
    }


def test_tensors_come_back_bit_by_bit_in_place(tmp_path: Path) -> None:
    assert not has_shards(tmp_path)
    written = tensors()
    write_shards(tmp_path, written, rank=0)
    assert has_shards(tmp_path)
    read = {name: torch.zeros_like(tensor) for name, tensor in written.items()}
    places = {name: tensor.data_ptr() for name, tensor in read.items()}
    read_shards(tmp_path, read)
    assert all(torch.equal(read[name], written[name]) for name in written)
    assert {name: tensor.data_ptr() for name, tensor in read.items()} == places


def test_each_rank_has_a_file_that_says_what_it_holds(tmp_path: Path) -> None:
    whole = tensors()
    names = list(whole)
    for rank, some in enumerate((names[:1], names[1:])):
        write_shards(tmp_path, {name: whole[name] for name in some}, rank=rank)
    files = sorted((tmp_path / FOLDER).iterdir())
    assert [path.suffix for path in files] == [".safetensors"] * 2
    headers = []
    for path in files:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        headers.append(json.loads(data[8 : 8 + length]))
    assert [sorted(set(header) - {"__metadata__"}) for header in headers] == [sorted(names[:1]), sorted(names[1:])]
    read = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    read_shards(tmp_path, read)
    assert all(torch.equal(read[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actor/weight/b": torch.zeros(2)}, "actor/weight/b"),
        ({"actor/weight/a": torch.zeros(6, 3)}, "actor/weight/a"),
    ],
)
def test_what_is_missing_or_of_another_shape_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor], message: str
) -> None:
    write_shards(tmp_path, tensors(), rank=0)
    with pytest.raises(CheckpointError, match=message):
        read_shards(tmp_path, tensors() | change)
