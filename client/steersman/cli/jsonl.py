"""JSON lines in and out of the command."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from steersman.cli.console import InputError


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, `-` for stdin. InputError names file and line of a bad row; blank lines are skipped."""
    if str(path) == "-":
        lines = sys.stdin.read().splitlines()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: is a {type(row).__name__}, allowed: an object")
        rows.append(row)
    return rows


def field(row: dict[str, Any], name: str, where: str) -> Any:
    """A field of a row. InputError if it is missing."""
    if name not in row:
        raise InputError(f"{where}: has no {name!r}; it has {', '.join(row) or 'nothing'}")
    return row[name]


def dump(row: dict[str, Any]) -> str:
    """One line."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def writer(path: Path) -> Iterator[IO[str]]:
    """A file that appears when it is whole, `-` for stdout."""
    if str(path) == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)
