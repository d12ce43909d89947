"""The checkpoints of one run: numbered by step, the newest whole one found again, the last few kept."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.trainer.checkpoint.atomic import (
    CheckpointError,
    atomic_directory,
    read_manifest,
    remove_directory,
    remove_leftovers,
    verify,
)
from steersman.trainer.checkpoint.state import load_state, save_state

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint: every file was checked against the manifest when it was found."""

    step: int
    directory: Path

    @classmethod
    def at(cls, directory: Path) -> "Checkpoint":
        """The checkpoint in `directory`, which another process found to be whole."""
        match = _NAME.fullmatch(directory.name)
        if match is None:
            raise CheckpointError(f"{directory} is no checkpoint by its name, must be step-NNNNNNNN")
        return cls(step=int(match[1]), directory=directory)

    def state(self) -> dict[str, Any]:
        """The trainer state it holds."""
        return load_state(self.directory)


class CheckpointStore:
    """Checkpoints under ``root``, one directory for each step. One process writes to a root at a time."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        """Opens ``root`` and clears what a writer that died left. ValueError unless ``keep`` is at least 1."""
        if keep < 1:
            raise ValueError(f"keep is {keep}, must be at least 1 checkpoint")
        self._root = root
        self._keep = keep
        remove_leftovers(root)

    def save(
        self, step: int, *, state: dict[str, Any], write_files: Callable[[Path], None] | None = None
    ) -> Checkpoint:
        """Writes ``state`` and whatever ``write_files`` puts into the directory it is given, then drops the
        oldest.

        Old checkpoints go only after the new one is on disk. ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"step is {step}, must be at least 0")
        target = self._root / f"step-{step:08d}"
        with atomic_directory(target, metadata={"step": step}) as directory:
            save_state(directory, state)
            if write_files is not None:
                write_files(directory)
        for _, old in self._directories()[self._keep :]:
            remove_directory(old)
        return Checkpoint(step=step, directory=target)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. A broken one is reported in the log and passed over."""
        for step, directory in self._directories():
            try:
                verify(directory)
            except CheckpointError as error:
                _log.warning("passing over a checkpoint: %s", error)
                continue
            return Checkpoint(step=step, directory=directory)
        return None

    def steps(self) -> list[int]:
        """The steps of all checkpoints that have a manifest, newest first; their files are not checked."""
        found = []
        for step, directory in self._directories():
            try:
                read_manifest(directory)
            except CheckpointError:
                continue
            found.append(step)
        return found

    def _directories(self) -> list[tuple[int, Path]]:
        if not self._root.is_dir():
            return []
        matches = [(_NAME.fullmatch(path.name), path) for path in self._root.iterdir() if path.is_dir()]
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)
