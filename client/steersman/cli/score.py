"""Rows of `steersman score`, and `steersman logprobs`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steersman.cli import console, jsonl
from steersman.client.reference import ReferenceClient
from steersman.client.types import Score, ScoreItem

# Rows between two moves of the bar: eight calls of the client.
_ROWS_AT_ONCE: Final = 2048


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """A bar on stderr; calls of the yielded function move it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def item_of(row: dict[str, Any], where: str) -> ScoreItem:
    """The item of a row {"prompt", "response", "id"?, "context"?}. InputError for what cannot be scored."""
    context = row.get("context") or {}
    if not isinstance(context, dict):
        raise console.InputError(f"{where}: context is a {type(context).__name__}, allowed: an object")
    return ScoreItem(
        prompt=jsonl.field(row, "prompt", where),
        response=jsonl.field(row, "response", where),
        id=str(row["id"]) if row.get("id") is not None else "",
        context=context,
    )


def score_row(score: Score) -> dict[str, Any]:
    """A score as a JSON row: with "score", or with "error"; never both."""
    row: dict[str, Any] = {"id": score.id} if score.id else {}
    if score.error is not None:
        reason = score.error.reason or score.error.code.name
        return row | {"error": {"reason": str(reason), "message": score.error.message}}
    row["score"] = score.value
    if score.raw is not None:
        row["raw"] = score.raw
    if score.length_penalty is not None:
        row["length_penalty"] = score.length_penalty
    if score.members:
        row["members"] = {member.scorer: member.value for member in score.members}
        row["spread"] = score.spread
    if score.truncated:
        row["truncated"] = True
    who = {"scorer": score.scorer, "model": score.model, "revision": score.revision}
    return row | {"num_tokens": score.num_tokens} | who


def logprobs_file(
    client: ReferenceClient, source: Path, target: Path, *, temperature: float, entropy: bool, timeout: float | None
) -> None:
    """Log-probs for the rows {"token_ids", "prompt_length"?} of a JSONL file."""
    rows = jsonl.read(source)
    sequences: list[Sequence[int]] = []
    lengths: list[int] = []
    for number, row in enumerate(rows, start=1):
        length = row.get("prompt_length", 1)
        if not isinstance(length, int):
            raise console.InputError(f"{source}: row {number}: prompt_length is {length!r}, allowed: a whole number")
        sequences.append(jsonl.field(row, "token_ids", f"{source}: row {number}"))
        lengths.append(length)
    with jsonl.writer(target) as file, progress_bar("log-probs", len(rows)) as advance:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            result = client.logprobs(
                sequences[part], lengths[part], temperature=temperature, entropy=entropy, timeout=timeout
            )
            for index, values in enumerate(result.logprobs):
                found: dict[str, Any] = {"logprobs": values.tolist()}
                if result.entropies is not None:
                    found["entropies"] = result.entropies[index].tolist()
                file.write(jsonl.dump(found))
            advance(len(result.logprobs))
