"""Parquet in and out of the command, in row groups. Needs the `parquet` extra, and only where it is used."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from steersman.cli.console import CommandError, InputError

_ROWS_IN_GROUP: Final = 16_384
_ROWS_AT_ONCE: Final = 512


def require() -> Any:
    """The library. CommandError, naming the extra, if it is not there."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CommandError("Parquet files need pyarrow: pip install 'steersman[parquet]'") from None
    return pyarrow


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file, a few at once in memory; columns without a value are left out."""
    arrow = require()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield {name: value for name, value in row.items() if value is not None}
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def write_scores(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes rows of scores; every file has the same columns, whatever its rows hold."""
    arrow = require()
    left = iter(rows)
    with arrow.parquet.ParquetWriter(path, _scores_schema(arrow)) as writer:
        while group := list(islice(left, _ROWS_IN_GROUP)):
            writer.write_table(arrow.Table.from_pylist([_columns(row) for row in group], schema=writer.schema))


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"members": list(row["members"].items())} if "members" in row else row


def _scores_schema(arrow: Any) -> Any:
    text, number = arrow.string(), arrow.float64()
    return arrow.schema(
        {
            "id": text,
            "score": number,
            "error": arrow.struct({"reason": text, "message": text}),
            "raw": number,
            "length_penalty": number,
            "members": arrow.map_(text, number),
            "spread": number,
            "truncated": arrow.bool_(),
            "num_tokens": arrow.int64(),
            "scorer": text,
            "model": text,
            "revision": text,
        }
    )
