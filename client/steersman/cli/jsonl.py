"""Rows into the command, and JSON lines out of it."""

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, cast

from steersman.cli import parquet
from steersman.cli.console import InputError


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; as `rows`."""
    return list(rows(path))


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file one by one, `-` for stdin: JSONL, also gzipped (`.gz`), or Parquet (`.parquet`).

    InputError names file and line of a bad row; blank lines are skipped.
    """
    if path.suffix == ".parquet":
        yield from parquet.read(path)
        return
    try:
        with _lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _lines(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    if str(path) == "-":
        return nullcontext(sys.stdin.buffer)
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: is not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deep") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: is a {type(row).__name__}, allowed: an object")
    return row


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
