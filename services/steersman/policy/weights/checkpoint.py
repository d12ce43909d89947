"""Reads the tensors of a Hugging Face safetensors checkpoint as raw bytes.

The format (https://github.com/huggingface/safetensors#format): a little-endian uint64 with the length of a
JSON header, the header with dtype, shape and [begin, end) of each tensor, then the data. Reading it raw
keeps torch out of this process and knows every dtype, bfloat16 included.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from steersman.policy.weights.manifest import HostManifest, TensorSpec

_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER_BYTES: Final = 100_000_000
"""The limit that the format itself sets."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    file: Path
    offset: int
    spec: TensorSpec


class Checkpoint:
    """A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers. Raises `ValueError` naming the file that is missing or malformed."""
        self._entries = {entry.spec.name: entry for file in _files(folder) for entry in _read_header(file)}
        self.manifest = HostManifest.of(entry.spec for entry in self._entries.values())

    def read_into(self, copy: memoryview) -> None:
        """Fills a host copy of `manifest`. Raises `ValueError` if a file is cut short."""
        files: dict[Path, BufferedReader] = {}
        try:
            for slot in self.manifest.slots:
                entry = self._entries[slot.name]
                file = files.get(entry.file) or files.setdefault(entry.file, entry.file.open("rb"))
                file.seek(entry.offset)
                _read_exactly(file.readinto, copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes], entry)
        finally:
            for file in files.values():
                file.close()


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if not single.exists():
        raise ValueError(f"model is {str(folder)!r}, allowed: a folder with model.safetensors or its shards")
    return [single]


def _read_header(path: Path) -> Iterator[_Entry]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"{path}: header of {length} bytes, not a safetensors file")
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            allowed = ", ".join(_DTYPES)
            raise ValueError(f"{path}: dtype of {name!r} is {entry['dtype']!r}, allowed: {allowed}")
        spec = TensorSpec(name=name, shape=tuple(entry["shape"]), dtype=_DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        if end - begin != spec.nbytes:
            raise ValueError(f"{path}: tensor {name!r} has {end - begin} bytes, expected {spec.nbytes}")
        yield _Entry(file=path, offset=8 + length + begin, spec=spec)


def _read_exactly(readinto: Callable[[memoryview], int | None], target: memoryview, entry: _Entry) -> None:
    done = 0
    while done < len(target):
        count = readinto(target[done:])
        if not count:
            raise ValueError(f"{entry.file}: ends within tensor {entry.spec.name!r}")
        done += count
