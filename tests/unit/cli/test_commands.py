"""Pieces of the commands that need no server."""

import io
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from steersman.cli.console import CommandError, explain, out
from steersman.cli.generate import parse_ids
from steersman.cli.job_view import JobView, jobs_table, key_metrics
from steersman.cli.main import app
from steersman.cli.score import score_row
from steersman.cli.train import apply_override, read_config
from steersman.client.types import (
    Job,
    JobEvent,
    JobKind,
    JobProgress,
    JobResources,
    JobState,
    MemberScore,
    Score,
    StateChange,
    StepMetrics,
)
from steersman.wire.errors import Code, SteersmanError, invalid_field

JOB = Job(
    id="my-job",
    kind=JobKind.PPO,
    config={},
    resources=JobResources(),
    state=JobState.RUNNING,
    progress=JobProgress(step=1, total_steps=4, message="starts"),
    run_directory="runs/my-job",
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
)


def event(sequence: int, what: StateChange | JobProgress | StepMetrics) -> JobEvent:
    return JobEvent(sequence=sequence, time=datetime(2026, 1, 1, tzinfo=UTC), event=what)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=1e-5", {"lr": 1e-5, "policy": {"address": "a:1"}}),
        ("policy.wait=true", {"policy": {"address": "a:1", "wait": True}}),
        ("data.train.path=x=y", {"policy": {"address": "a:1"}, "data": {"train": {"path": "x=y"}}}),
        ("stop=[1, 2]", {"policy": {"address": "a:1"}, "stop": [1, 2]}),
        ("name=", {"policy": {"address": "a:1"}, "name": None}),
    ],
)
def test_overrides(override: str, expected: dict[str, Any]) -> None:
    config: dict[str, Any] = {"policy": {"address": "a:1"}}
    apply_override(config, override)
    assert config == expected


@pytest.mark.parametrize("override", ["lr", "=1", "a..b=1", "policy.address.port=1", "x={"])
def test_bad_overrides_are_said(override: str) -> None:
    with pytest.raises(CommandError, match="--set"):
        apply_override({"policy": {"address": "a:1"}}, override)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text("a: 1e-5\nb: 1.5E3\nc: 7\nd: 1e\ne: -2e+3\n")
    assert read_config(path, []) == {"a": 1e-5, "b": 1500.0, "c": 7, "d": "1e", "e": -2000.0}
    path.write_text("- 1\n")
    with pytest.raises(CommandError, match="is a list, allowed: a mapping"):
        read_config(path, [])


def test_token_ids_from_text() -> None:
    assert parse_ids("1 2,3") == parse_ids("[1, 2, 3]") == [1, 2, 3]
    with pytest.raises(CommandError, match="whole numbers"):
        parse_ids("1 x")


def test_a_failed_score_never_has_a_value() -> None:
    failed = Score(id="a", value=None, error=SteersmanError(None, "gone", code=Code.UNAVAILABLE))
    assert score_row(failed) == {"id": "a", "error": {"reason": "UNAVAILABLE", "message": "gone"}}
    member = MemberScore(scorer="length", value=1.0, error=None, weight=1.0)
    scored = Score(id="", value=1.5, error=None, members=(member,), spread=0.0, truncated=True, num_tokens=3)
    row = score_row(scored)
    assert (row["score"], row["members"], row["truncated"]) == (1.5, {"length": 1.0}, True)
    assert "error" not in row


def test_errors_name_each_bad_field_once() -> None:
    single = invalid_field("lr", -1, "above 0")
    assert explain(single) == "INVALID_FIELD: lr is -1, allowed: above 0"
    away = SteersmanError(None, "127.0.0.1:1: refused", code=Code.UNAVAILABLE)
    assert "steersman status" in explain(away)


def test_the_most_telling_numbers_come_first() -> None:
    values = {"zzz": 1.0, "objective/kl": 2.0, "time/rollout": 3.0, "objective/rlhf_reward": 4.0}
    assert list(key_metrics(values)) == ["objective/rlhf_reward", "objective/kl", "zzz"]
    assert len(key_metrics({str(number): 0.0 for number in range(20)})) == 8


def test_the_view_draws_bar_numbers_and_message_on_a_terminal() -> None:
    screen = io.StringIO()
    view = JobView(JOB, Console(file=screen, force_terminal=True, width=160, color_system=None))
    view.show(
        [
            event(1, StepMetrics(step=2, values={"objective/kl": 0.125, "bad": math.nan})),
            event(2, JobProgress(step=3, total_steps=4, message="waits for policy 127.0.0.1:50051")),
        ]
    )
    for part in ("my-job (ppo)", "3/4", "objective/kl 0.125", "bad nan", "waits for policy 127.0.0.1:50051"):
        assert part in screen.getvalue()
    assert view.state is JobState.RUNNING


def test_the_view_writes_plain_lines_elsewhere() -> None:
    screen = io.StringIO()
    view = JobView(JOB, Console(file=screen, width=160))
    events = [
        JobProgress(step=0, total_steps=0, message="starting"),
        JobProgress(step=0, total_steps=4, message="reading"),
        JobProgress(step=0, total_steps=4, message="reading"),  # a sign of life, no news
        StateChange(state=JobState.FAILED, error="out of [memory]"),
    ]
    view.show([event(number, payload) for number, payload in enumerate(events, start=1)])
    view.note("lost the trainer service")
    assert screen.getvalue().splitlines() == [
        "my-job: starting",
        "step 0/4: reading",
        "my-job: failed: out of [memory]",
        "lost the trainer service",
    ]
    assert (view.state, view.error) == (JobState.FAILED, "out of [memory]")


def test_a_job_is_one_line_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    failed = replace(JOB, state=JobState.FAILED, error="worker exited; " + "x" * 300 + "\nlast log lines")
    out().print(jobs_table([failed]))
    header, row = capsys.readouterr().out.splitlines()
    assert header.startswith("JOB")
    assert row.rstrip().endswith("x" * 300)


def test_jobs_table() -> None:
    screen = io.StringIO()
    Console(file=screen, width=160).print(jobs_table([JOB]))
    for part in ("my-job", "ppo", "running", "1/4", "starts"):
        assert part in screen.getvalue()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, "steersman 0."),
        (["--help"], 0, "logprobs"),
        (["jobs", "--help"], 0, "resume"),
        (["score", "-p", "only a prompt"], 2, "--input"),
        (["logprobs"], 2, "--ids"),
        (["train", "dpo", "x.yaml"], 2, "dpo"),
        (["report", "no-such-folder"], 2, "no-such-folder"),
        (["jobs"], 2, "resume"),
        (["--token-file", __file__, "jobs", "list"], 2, "--tls"),
    ],
)
def test_usage(arguments: list[str], code: int, text: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert text in result.output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "sft", "none.yaml"], "'none.yaml' does not exist"),
        (["train", "sft", "broken.yaml"], "broken.yaml:1:5: is not valid YAML"),
        (["train", "sft", "binary.yaml"], "binary.yaml: is not UTF-8 text"),
        (["train", "sft", "list.yaml"], "list.yaml: is a list"),
        (["train", "sft", "good.yaml", "--set", "x"], "--set is 'x'"),
        (["train", "dance", "good.yaml"], "'dance' is not one of"),
        (["up", "none.yaml"], "'none.yaml' does not exist"),
        (["up", "broken.yaml"], "broken.yaml:1:5: is not valid YAML"),
        (["up", "list.yaml"], "list.yaml has bad settings"),
        (["score", "-i", "none.jsonl"], "none.jsonl: cannot be read: No such file"),
        (["logprobs", "-i", "none.jsonl"], "none.jsonl: cannot be read: No such file"),
        (["logprobs", "--ids", "one"], "token ids are 'one'"),
        (["generate", "--ids", "one"], "token ids are 'one'"),
        (["generate", "-n", "0", "prompt"], "--num-samples"),
        (["report", "none"], "RUN_DIRECTORY is none"),
        (["report", "."], "RUN_DIR is '.'"),
        (["report", ".", "--loud"], "unrecognized arguments: --loud"),
        (["dance"], "'dance'"),
        (["jobs", "get"], "missing argument"),
    ],
)
def test_wrong_usage_is_one_plain_line(
    arguments: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("a: b: c")
    Path("binary.yaml").write_bytes(b"\xff\xfe")
    Path("list.yaml").write_text("[1]")
    Path("good.yaml").write_text("{}")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    line, *violations = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert all(violation.startswith("  ") for violation in violations)
