"""Directories that are either whole or not there.

Invariants:

- A directory with a ``manifest.json`` had all its files on disk before the manifest was written: the manifest
  comes last.
- A directory appears under its name by one rename within one file system, after everything in it reached the
  disk.
- :func:`verify` accepts a directory only if every file has the size and the digest that the manifest says.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
_FORMAT = 1
_TEMPORARY_PREFIX = ".partial-"
_READ_BYTES = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken or not what was asked for; the message says which file and why."""


@contextlib.contextmanager
def atomic_directory(target: Path, *, metadata: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Gives an empty directory beside ``target`` to fill; it becomes ``target`` when the block ends without
    an error.

    The manifest is written then, with ``metadata`` (JSON values) in it. If the block raises, nothing of it
    stays. An earlier ``target`` is replaced: between two renames there is a moment with none, but never one
    with half of each.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{_TEMPORARY_PREFIX}{target.name}-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        _write_manifest(partial, metadata or {})
        if target.exists():
            retired = partial.with_name(partial.name + "-old")
            target.rename(retired)
            partial.rename(target)
            remove_directory(retired)
        else:
            partial.rename(target)
        _sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """A JSON file that appears whole. ValueError for a number that is not finite."""
    partial = path.with_name(f"{_TEMPORARY_PREFIX}{path.name}")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of ``directory``. CheckpointError if there is none or it cannot be read."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a whole checkpoint: it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has an unknown format, must be {_FORMAT}")
    return manifest


def verify(directory: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest of ``directory``, after checking that every file is there with its size and (``digests``)
    its digest.

    CheckpointError names the first file that does not fit.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{directory} is broken: {name} is missing")
        size = path.stat().st_size
        if size != entry["size_bytes"]:
            raise CheckpointError(f"{path} is broken: {size} bytes, must be {entry['size_bytes']}")
        if digests and _digest(path) != entry["xxh3_128"]:
            raise CheckpointError(f"{path} is broken: its xxh3 digest differs from the manifest's")
    return manifest


def remove_directory(directory: Path) -> None:
    """Removes ``directory``, manifest first: what a crash leaves is not taken for whole."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def remove_leftovers(parent: Path) -> int:
    """Removes what writers that died left in ``parent``; gives how many. Only while nobody writes there."""
    leftovers = list(parent.glob(f"{_TEMPORARY_PREFIX}*")) if parent.is_dir() else []
    for leftover in leftovers:
        remove_directory(leftover)
    return len(leftovers)


def _write_manifest(directory: Path, metadata: Mapping[str, Any]) -> None:
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        _sync_file(path)
        name = path.relative_to(directory).as_posix()
        files[name] = {"size_bytes": path.stat().st_size, "xxh3_128": _digest(path)}
    manifest = {"format": _FORMAT, "metadata": dict(metadata), "files": files}
    path = directory / MANIFEST
    path.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _sync_file(path)
    for folder in (directory, *(p for p in directory.rglob("*") if p.is_dir())):
        _sync_directory(folder)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
