"""The run folder: a step has one row, in JSONL and in the event files, also after a rewind; rows reach the disk."""

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steersman.trainer.stages.run import METRICS_FILE, SAMPLES_FILE, Run, read_rows


def scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_every_step_is_recorded_once_also_where_steps_are_done_again(tmp_path: Path) -> None:
    with Run(tmp_path, run_id="demo") as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": step / 2, "eps": 8.0})
            run.samples([{"step": step, "response": "grüß"}])
        # Whoever looks while the job runs sees the steps that are done.
        assert scalars(run) == {"loss": [(1, 0.5), (2, 1.0), (3, 1.5)], "eps": [(1, 8.0), (2, 8.0), (3, 8.0)]}
    with Run(tmp_path, run_id="demo") as run:
        run.rewind(1)
        run.log(2, {"loss": 7.0})
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / METRICS_FILE)] == [(1, 0.5), (2, 7.0)]
    assert [row["step"] for row in read_rows(tmp_path / SAMPLES_FILE)] == [1]
    assert scalars(run)["loss"] == [(1, 0.5), (2, 7.0)]


def test_rows_reach_the_disk_when_asked_and_no_step_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: on_disk.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    with Run(tmp_path, run_id="demo") as run:
        run.log(1, {"loss": 1.0})
        run.log(2, {"loss": 1.0})
        assert on_disk == []
        assert [row["step"] for row in read_rows(tmp_path / METRICS_FILE)] == [1, 2]
        run.sync()
        run.sync()
        assert on_disk == [METRICS_FILE]
        run.samples([{"step": 2}])
    assert on_disk == [METRICS_FILE, SAMPLES_FILE]
