"""Which start of a run this is."""

import json
import os
from pathlib import Path
from typing import Final

ATTEMPT_FILE: Final = "attempt.json"


def next_attempt(directory: Path) -> int:
    """The number of this start of the run in `directory`, 1 for the first; on disk before it returns.

    Counted even if the start fails at once: a number is never used twice, whatever is killed when.
    """
    path = directory / ATTEMPT_FILE
    attempt = int(json.loads(path.read_text(encoding="utf-8"))["attempt"]) + 1 if path.exists() else 1
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"attempt": attempt}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return attempt
