"""`steersman score FILE`: files of any length, a few rows at once in memory, and none scored twice.

Beside an output `scores.jsonl` lie, while it is being made, `scores.jsonl.partial`, rows as far as they are done, and
for good `scores.jsonl.run.json`, what was scored by what and how.

Invariants:

- Row n of the output is the score, or the error, of row n of the source.
- The output appears when it is whole. What a killed run leaves is a beginning of it, maybe with half a line at the end.
- A run goes on only with what an equal one has left: same content of the source, same scorer, model and options.
"""

import fcntl
import hashlib
import json
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import typer

from steersman.cli import console, jsonl, parquet
from steersman.cli.row_progress import RowProgress
from steersman.cli.score import item_of, score_row
from steersman.client.reward import RewardClient, item_to_proto
from steersman.client.types import Overlength, Priority
from steersman.wire.errors import SteersmanError

_CHUNK_ROWS: Final = 512
# Each is two calls of the client: together they keep a batching server busy without holding its whole queue.
_CHUNKS_IN_FLIGHT: Final = 4
# For a chunk that waits behind others at a slow server.
_CHUNK_SECONDS: Final = 600.0
_SIGNAL_SECONDS: Final = 0.5

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ScoreFile:
    """What to score, how, and where to.

    Attributes:
        source: rows; `-` is stdin. target: JSONL, or Parquet by its ending; `-` is stdout.
        timeout: seconds for each 512 rows.
        overwrite: forget what an earlier run left. retry_failed: score rows again that have an error.
    """

    source: Path
    target: Path
    scorer: str = ""
    overlength: Overlength = Overlength.FAIL
    include_raw: bool = False
    timeout: float | None = None
    overwrite: bool = False
    retry_failed: bool = False

    def beside(self, ending: str) -> Path:
        """A file beside the output."""
        return self.target.with_name(self.target.name + ending)


def run(client: RewardClient, job: ScoreFile) -> int:
    """Scores the file, or the rest of it. Returns the number of rows without a score.

    Raises InputError for a row that cannot be sent, before anything is scored, and for an output of other arguments;
    SteersmanError if a whole call fails. After that, and after Ctrl-C, the same command goes on.
    """
    if job.target.suffix == ".parquet":
        parquet.require()
    from_stdin, to_stdout = str(job.source) == "-", str(job.target) == "-"
    if (from_stdin or to_stdout) and (job.retry_failed or job.target.suffix == ".parquet"):
        raise console.InputError("--retry-failed and Parquet outputs need files on both sides, not - ")
    total = None if from_stdin else _check(job.source)
    if from_stdin or to_stdout:
        return _pass_through(client, job, total)
    assert total is not None
    with _claimed(client, job, total):
        if not job.target.exists():
            _write(client, job, job.beside(".partial"), repeat(None), total)
        job.beside(".partial").unlink(missing_ok=True)
        failed = sum("error" in row for row in jsonl.rows(job.target))
        if failed and job.retry_failed:
            failed = _write(client, job, job.beside(".retry.partial"), jsonl.rows(job.target), total)
    return failed


def _check(source: Path) -> int:
    """The number of rows. InputError names the first one that cannot be sent."""
    number = 0
    for number, row in enumerate(jsonl.rows(source), start=1):
        where = f"{source}: row {number}"
        try:
            item_to_proto(item_of(row, where), where)
        except SteersmanError as error:
            raise console.InputError(console.explain(error)) from None
    return number


def _pass_through(client: RewardClient, job: ScoreFile, total: int | None) -> int:
    """Scores from stdin or to stdout, where there is nothing to go on with."""
    with jsonl.writer(job.target) as file, RowProgress("scoring", total) as progress:
        with closing(_scored(client, job, jsonl.rows(job.source), repeat(None))) as chunks:
            for chunk in chunks:
                file.writelines(map(jsonl.dump, chunk))
                file.flush()
                progress.advance(len(chunk), _num_failed(chunk))
        return progress.failed


@contextmanager
def _claimed(client: RewardClient, job: ScoreFile, total: int) -> Iterator[None]:
    """Holds the output against a second run, and makes sure that what lies there belongs to this one."""
    path = job.beside(".run.json")
    leftover = [old for old in (job.target, job.beside(".partial")) if old.exists()]
    if leftover and not path.exists() and not job.overwrite:
        raise console.InputError(
            f"{leftover[0]} is there already, and not from this command; --overwrite starts afresh"
        )
    wanted = _fingerprint(client, job, total)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise console.CommandError(f"another run is writing {job.target}") from None
        if job.overwrite:
            for old in (job.target, job.beside(".partial"), job.beside(".retry.partial")):
                old.unlink(missing_ok=True)
            file.truncate(0)
        found = _read_fingerprint(file)
        if found is None and not (job.target.exists() or job.beside(".partial").exists()):
            file.truncate(0)
            file.write(json.dumps(wanted, indent=2) + "\n")
            file.flush()
        elif found != wanted:
            raise console.InputError(_difference(job.target, found or {}, wanted))
        yield


def _fingerprint(client: RewardClient, job: ScoreFile, total: int) -> Row:
    """What the scores depend on. The model is the one that serves now, if the scorer is one."""
    with job.source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    known = client.scorers()
    scorer = next((one for one in known if one.name == job.scorer or (not job.scorer and one.is_default)), None)
    model = scorer.model if scorer is not None else None
    return {
        "source": job.source.name,
        "source_sha256": digest,
        "source_rows": total,
        "scorer": scorer.name if scorer is not None else job.scorer,
        "model": model.name if model is not None else "",
        "revision": model.revision if model is not None else "",
        "overlength": str(job.overlength),
        "include_raw": job.include_raw,
    }


def _read_fingerprint(file: IO[str]) -> Row | None:
    file.seek(0)
    try:
        found = json.load(file)
    except ValueError:
        return None  # killed before it was written
    return found if isinstance(found, dict) else None


def _difference(target: Path, found: Row, wanted: Row) -> str:
    lines = [
        f"  {name}: {found.get(name)!r} there, {value!r} now"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    return f"{target} was begun with other arguments; --overwrite starts afresh\n" + "\n".join(lines)


def _write(client: RewardClient, job: ScoreFile, partial: Path, before: Iterator[Row | None], total: int) -> int:
    """Brings `partial` to its end and makes it the output. Returns the number of rows without a score."""
    done, failed = _recover(partial)
    source = islice(jsonl.rows(job.source), done, None)
    with (
        RowProgress("scoring", total, done=done, failed=failed) as progress,
        partial.open("ab") as file,
        _ended_by_interrupt(client) as interrupted,
    ):
        try:
            with closing(_scored(client, job, source, islice(before, done, None))) as chunks:
                for chunk in chunks:
                    file.write("".join(map(jsonl.dump, chunk)).encode())
                    file.flush()
                    progress.advance(len(chunk), _num_failed(chunk))
        except Exception as error:
            if interrupted.is_set() or isinstance(error, SteersmanError):
                hint = ", without --overwrite," if job.overwrite else ""
                progress.note(f"{progress.done} of {total} rows are done. The same command{hint} goes on from there.")
            if interrupted.is_set():
                raise typer.Exit(130) from None
            raise
    if job.target.suffix == ".parquet":
        whole = job.beside(".new")
        parquet.write_scores(jsonl.rows(partial), whole)
        whole.replace(job.target)
        partial.unlink()
    else:
        partial.replace(job.target)
    return progress.failed


@contextmanager
def _ended_by_interrupt(client: RewardClient) -> Iterator[threading.Event]:
    """Ctrl-C ends the calls under way, and with them the run; a second one is as usual.

    Not KeyboardInterrupt: raised anywhere, it may be lost in a callback, and the run would wait on.
    """
    interrupted = threading.Event()

    def end(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=client.close, daemon=True).start()  # it takes locks that this thread may hold

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _recover(partial: Path) -> tuple[int, int]:
    """Cuts off what is not whole. Returns the number of rows left, and how many of them have an error."""
    done = failed = end = 0
    partial.touch()
    with partial.open("rb+") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                break
            done, failed, end = done + 1, failed + ("error" in row), end + len(line)
        file.truncate(end)
    return done, failed


def _scored(
    client: RewardClient, job: ScoreFile, source: Iterator[Row], before: Iterable[Row | None]
) -> Generator[list[Row], None, None]:
    """Chunks of output rows in order. Rows that had a score `before` keep it."""
    numbered = zip(source, before, strict=False)
    pool = ThreadPoolExecutor(_CHUNKS_IN_FLIGHT, thread_name_prefix="steersman-score")
    waiting: deque[Future[list[Row]]] = deque()
    try:
        while chunk := list(islice(numbered, _CHUNK_ROWS)):
            waiting.append(pool.submit(_score_chunk, client, job, chunk))
            if len(waiting) == _CHUNKS_IN_FLIGHT:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    except BaseException:
        client.close()  # ends the calls under way, which nobody waits for any more
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[T]) -> T:
    """Waits in short steps: a signal that comes just before a wait begins is handled only when it ends."""
    while not wait([future], _SIGNAL_SECONDS).done:
        pass
    return future.result()


def _score_chunk(client: RewardClient, job: ScoreFile, chunk: list[tuple[Row, Row | None]]) -> list[Row]:
    rows = [old for _, old in chunk]
    places = [place for place, old in enumerate(rows) if old is None or "error" in old]
    if places:
        scores = client.score(
            [item_of(chunk[place][0], f"{job.source}") for place in places],
            scorer=job.scorer,
            overlength=job.overlength,
            priority=Priority.BULK,
            include_raw=job.include_raw,
            timeout=_CHUNK_SECONDS if job.timeout is None else job.timeout,
        )
        for place, score in zip(places, scores, strict=True):
            rows[place] = score_row(score)
    return [row for row in rows if row is not None]


def _num_failed(rows: list[Row]) -> int:
    return sum("error" in row for row in rows)
