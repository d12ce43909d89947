"""Rows of JSONL, gzipped JSONL and Parquet files, from a local path or any fsspec URL, each with its file and line.

Files are streamed: one line, or one batch of Parquet rows, is in memory at a time. Form and meaning are not looked at
here.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import pyarrow.parquet as pq
from pyarrow import ArrowException

from steersman.trainer.data.records import Origin

_PARQUET_BATCH_ROWS = 1024
# A line is one example; one that is longer than this is a file that is no JSONL.
MAX_LINE_BYTES = 64 << 20


class DataError(ValueError):
    """Data that cannot be used; the message names the file, and the line and field where there is one."""


class BadRow(DataError):
    """One row that cannot be used: where it is, and why."""

    def __init__(self, origin: Origin, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin = origin
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Row:
    """The fields of one row, as the file has them."""

    fields: dict[str, Any]
    origin: Origin


def read_rows(file: str) -> Iterator[Row | BadRow]:
    """The rows of ``file`` in order; a line that is no JSON object comes as a :class:`BadRow`, not raised.

    The ending decides: ``.jsonl`` or ``.ndjson`` (also with ``.gz``), ``.parquet``. DataError if the file is missing,
    cannot be read, is cut off, or ends otherwise. Blank lines are passed over.
    """
    name = file.split("?", 1)[0].lower()
    if name.endswith(".parquet"):
        read = _parquet_rows
    elif name.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
        read = _json_rows
    else:
        raise DataError(f"{file}: unknown kind of file, must end in .jsonl, .jsonl.gz, .ndjson, .ndjson.gz or .parquet")
    try:
        with _open(file) as stream:
            yield from read(stream, file)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file") from error
    except (OSError, EOFError, zlib.error, ImportError, ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _open(file: str) -> IO[bytes]:
    if "://" in file:
        try:
            return cast(IO[bytes], fsspec.open(file, "rb").open())
        except ValueError as error:  # fsspec's word for a protocol that it does not know
            raise DataError(f"{file}: {error}") from error
    return Path(file).expanduser().open("rb")


def _json_rows(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    lines = cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if file.lower().endswith(".gz") else stream
    number = 0
    while line := lines.readline(MAX_LINE_BYTES + 1):
        number += 1
        origin = Origin(file=file, line=number)
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{origin}: the line is longer than {MAX_LINE_BYTES} bytes")
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            yield BadRow(origin, f"is not valid JSON: {error}")
            continue
        if isinstance(fields, dict):
            yield Row(fields=fields, origin=origin)
        else:
            yield BadRow(origin, f"is a JSON {type(fields).__name__}, must be an object")


def _parquet_rows(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=_PARQUET_BATCH_ROWS):
        for fields in batch.to_pylist():
            number += 1
            yield Row(fields=fields, origin=Origin(file=file, line=number))
