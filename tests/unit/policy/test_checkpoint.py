"""Reading safetensors checkpoints, against the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steersman.policy.weights.checkpoint import Checkpoint

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.arange(5).to(torch.bfloat16),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
}


def read(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    copy = bytearray(checkpoint.manifest.nbytes)
    checkpoint.read_into(memoryview(copy))
    found = {}
    for slot in checkpoint.manifest.slots:
        raw = bytearray(copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes])
        dtype = getattr(torch, slot.dtype)
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        found[slot.name] = flat.view(slot.shape)
    return found


def assert_equal(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(read(tmp_path))


def test_shards(tmp_path: Path) -> None:
    weight_map = {}
    for index, name in enumerate(TENSORS):
        file = f"model-{index}.safetensors"
        save_file({name: TENSORS[name]}, tmp_path / file)
        weight_map[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(read(tmp_path))


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"allowed: a folder with model\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (10_000).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        Checkpoint(tmp_path)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends within tensor"):
        read(tmp_path)
