"""`steersman score FILE`: runs that are killed, interrupted or refused, and go on; Parquet and gzip."""

import asyncio
import fcntl
import gzip
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from steersman.cli.main import app
from steersman.cli.row_progress import RowProgress
from steersman.v1 import reward_pb2, reward_pb2_grpc, types_pb2
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.status import status_to_proto

CHUNK = 512
DEADLINE = 60


class FakeReward(reward_pb2_grpc.RewardServiceServicer):
    """The score of a response is its number; stands still at `stands_at`, and fails those in `bad`."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.bad: set[int] = set()
        self.stands_at: int | None = None
        self.refuses_at: int | None = None
        self.revision = "r1"
        self.go_on = asyncio.Event()
        self.refuse: Any = None

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        numbers = [int(item.text.response) for item in request.items]
        if self.stands_at in numbers:
            await self.go_on.wait()
        if self.refuses_at in numbers:
            await self.refuse(context, SteersmanError(Reason.INTERNAL, "broken"))
        self.asked += numbers
        response = reward_pb2.ScoreResponse()
        for item, number in zip(request.items, numbers, strict=True):
            if number in self.bad:
                status = status_to_proto(SteersmanError(Reason.SCORER_FAILED, "no idea"))
                response.results.append(reward_pb2.ItemScore(id=item.id, status=status))
            else:
                response.results.append(
                    reward_pb2.ItemScore(id=item.id, status=status_to_proto(None), score=number, num_tokens=2)
                )
        return response

    async def ListScorers(self, request: Any, context: Any) -> reward_pb2.ListScorersResponse:
        model = types_pb2.ModelInfo(name="tiny", dtype=types_pb2.DATA_TYPE_FLOAT32, revision=self.revision)
        scorer = reward_pb2.Scorer(name="good", kind=reward_pb2.SCORER_KIND_MODEL, is_default=True, model=model)
        return reward_pb2.ListScorersResponse(scorers=[scorer])


@pytest.fixture
def fake(refuse: Any) -> FakeReward:
    made = FakeReward()
    made.refuse = refuse
    return made


@pytest.fixture
async def address(serve: Any, fake: FakeReward) -> str:
    found: str = await serve(reward_pb2_grpc.add_RewardServiceServicer_to_server, fake)
    return found


@pytest.fixture
def score(address: str) -> Callable[..., Any]:
    async def run(*arguments: str | Path) -> Result:
        command = ["score", *map(str, arguments)]
        return await asyncio.to_thread(
            CliRunner().invoke, app, command, None, {"STEERSMAN_REWARD_ADDRESS": address, "COLUMNS": "200"}
        )

    return run


def write_source(path: Path, count: int) -> Path:
    rows = "".join(json.dumps({"id": f"i{n}", "prompt": "p\u2028", "response": str(n)}) + "\n" for n in range(count))
    path.write_bytes(gzip.compress(rows.encode()) if path.suffix == ".gz" else rows.encode())
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores_of(path: Path) -> list[float | None]:
    rows = rows_of(path)
    assert [row["id"] for row in rows] == [f"i{n}" for n in range(len(rows))]
    return [row.get("score") for row in rows]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_a_run_that_is_ended_goes_on(
    number: signal.Signals, address: str, fake: FakeReward, score: Any, tmp_path: Path
) -> None:
    total, fake.stands_at = 6 * CHUNK + 7, 2 * CHUNK + 300
    source, target, partial = write_source(tmp_path / "in.jsonl", total), tmp_path / "o.jsonl", "o.jsonl.partial"
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "steersman.cli.main", "score", str(source), "-o", str(target), "--address", address),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0"},
    )
    try:
        async with asyncio.timeout(DEADLINE):
            while not (tmp_path / partial).exists() or (tmp_path / partial).read_bytes().count(b"\n") < 2 * CHUNK:
                await asyncio.sleep(0.01)
            child.send_signal(number)
            _, said = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    fake.go_on.set()
    if number == signal.SIGINT:
        assert child.returncode == 130
        # The signal may come after a chunk was written and before it was counted.
        counted = rf"({CHUNK}|{2 * CHUNK}) of {total} rows are done\. The same command goes on from there\."
        assert re.search(counted, said.decode())
    assert not target.exists()
    with (tmp_path / partial).open("ab") as file:
        file.write(b'{"id": "i1024", "sco')
    fake.asked.clear()
    result = await score(source, "-o", target)
    assert result.exit_code == 0, result.output
    assert scores_of(target) == [float(n) for n in range(total)]
    assert set(fake.asked) >= set(range(2 * CHUNK, total))
    again = len(fake.asked)
    assert (await score(source, "-o", target)).exit_code == 0
    assert len(fake.asked) == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "o.jsonl", "o.jsonl.run.json"]


async def test_a_call_that_fails_ends_the_run_with_what_is_done(fake: FakeReward, score: Any, tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 3 * CHUNK), tmp_path / "o.jsonl"
    fake.refuses_at = 2 * CHUNK
    result = await score(source, "-o", target)
    assert result.exit_code == 1
    assert "error: INTERNAL: " in result.stderr
    assert f"{2 * CHUNK} of {3 * CHUNK} rows are done. The same command goes on" in result.stderr
    fake.refuses_at = None
    fake.asked.clear()
    assert (await score(source, "-o", target)).exit_code == 0
    assert sorted(fake.asked) == list(range(2 * CHUNK, 3 * CHUNK))
    assert scores_of(target) == [float(n) for n in range(3 * CHUNK)]


async def test_other_arguments_do_not_go_on(fake: FakeReward, score: Any, tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 3), tmp_path / "o.jsonl"
    assert (await score(source, "-o", target)).exit_code == 0
    assert "'good' there, 'other' now" in (await score(source, "-o", target, "--scorer", "other")).stderr
    raw = await score(source, "-o", target, "--include-raw")
    assert raw.exit_code == 2
    assert "--overwrite starts afresh" in raw.stderr
    assert "include_raw: False there, True now" in raw.stderr
    fake.revision = "r2"
    assert "revision: 'r1' there, 'r2' now" in (await score(source, "-o", target)).stderr
    write_source(source, 4)
    changed = await score(source, "-o", target)
    assert "source_sha256" in changed.stderr
    assert "source_rows: 3 there, 4 now" in changed.stderr
    assert len(rows_of(target)) == 3
    assert (await score(source, "-o", target, "--overwrite")).exit_code == 0
    assert scores_of(target) == [0.0, 1.0, 2.0, 3.0]
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    refused = await score(source, "-o", foreign)
    assert (refused.exit_code, foreign.read_text()) == (2, "mine")
    assert "is there already" in refused.stderr


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
async def test_failed_rows_are_scored_again_and_no_others(
    ending: str, fake: FakeReward, score: Any, tmp_path: Path
) -> None:
    total = CHUNK + 9
    source, target = write_source(tmp_path / "in.jsonl.gz", total), tmp_path / f"o.{ending}"
    fake.bad = {3, CHUNK + 1}
    first = await score(source, "-o", target)
    assert first.exit_code == 1
    assert "2 items have no score" in first.stderr
    fake.asked.clear()
    assert (await score(source, "-o", target)).exit_code == 1
    assert fake.asked == []
    fake.bad = {3}
    assert (await score(source, "-o", target, "--retry-failed")).exit_code == 1
    assert sorted(fake.asked) == [3, CHUNK + 1]
    rows = rows_of(target) if ending == "jsonl" else pq.read_table(target).to_pylist()
    assert [row["id"] for row in rows] == [f"i{n}" for n in range(total)]
    assert [row.get("score") for row in rows] == [None if n == 3 else float(n) for n in range(total)]
    assert rows[3]["error"] == {"reason": "SCORER_FAILED", "message": "no idea"}
    fake.bad = set()
    assert (await score(source, "-o", target, "--retry-failed")).exit_code == 0


async def test_a_second_try_that_is_ended_goes_on_too(fake: FakeReward, score: Any, tmp_path: Path) -> None:
    last = 5 * CHUNK + 1
    source, target = write_source(tmp_path / "in.jsonl", 6 * CHUNK), tmp_path / "o.jsonl"
    fake.bad = {3, last}
    assert (await score(source, "-o", target)).exit_code == 1
    before = target.read_bytes()
    fake.bad, fake.refuses_at = set(), last
    fake.asked.clear()
    ended = await score(source, "-o", target, "--retry-failed")
    assert (ended.exit_code, fake.asked) == (1, [3])
    assert "rows are done. The same command goes on" in ended.stderr
    assert target.read_bytes() == before
    fake.refuses_at = None
    assert (await score(source, "-o", target, "--retry-failed")).exit_code == 0
    assert fake.asked == [3, last]
    assert scores_of(target) == [float(n) for n in range(6 * CHUNK)]


async def test_two_runs_do_not_write_one_output(fake: FakeReward, score: Any, tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 3), tmp_path / "o.jsonl"
    with (tmp_path / "o.jsonl.run.json").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = await score(source, "-o", target, "--overwrite")
    assert refused.exit_code == 1
    assert f"another run is writing {target}" in refused.stderr
    assert fake.asked == []
    assert (await score(source, "-o", target)).exit_code == 0


async def test_parquet_goes_in(score: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    source, target = tmp_path / "in.parquet", tmp_path / "o.jsonl"
    reply = {"role": "assistant", "content": "x"}
    columns = {"prompt": ["p", "p"], "response": ["4", "5"], "id": ["i0", "i1"], "context": [None, {"a": 1}]}
    pq.write_table(pa.table(columns), source)
    assert (await score(source, "-o", target)).exit_code == 0
    assert scores_of(target) == [4.0, 5.0]
    pq.write_table(pa.table({"prompt": ["p"], "response": [reply]}), source)
    bad = await score(source, "-o", target, "--overwrite")
    assert bad.exit_code == 2
    source.write_bytes(b"PAR1")
    assert "in.parquet: cannot be read" in (await score(source, "-o", target)).stderr


async def test_parquet_without_its_library_names_the_extra(
    score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = await score(write_source(tmp_path / "in.jsonl", 1), "-o", tmp_path / "o.parquet")
    assert result.exit_code == 1
    assert "steersman[parquet]" in result.stderr


def test_progress_is_a_plain_line_now_and_then_without_a_terminal() -> None:
    screen, now = io.StringIO(), [0.0]
    progress = RowProgress("scoring", 100, done=20, output=Console(file=screen, width=200), clock=lambda: now[0])
    with progress:
        for second in (4.0, 10.0, 12.0, 20.0):
            now[0] = second
            progress.advance(10, int(second == 12.0))
    assert screen.getvalue().splitlines() == [
        "40/100 rows, 2.0 rows/s, 30 s left",
        "60/100 rows, 2.0 rows/s, 20 s left, 1 failed",
    ]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen, now = io.StringIO(), [0.0]
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    with RowProgress("scoring", 100, output=console, clock=lambda: now[0]) as progress:
        now[0] = 2.0
        progress.advance(50, 0)
    assert "50/100 25.0 rows/s" in screen.getvalue()
