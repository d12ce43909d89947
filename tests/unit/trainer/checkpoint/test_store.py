import logging

import pytest

from steersman.trainer.checkpoint.store import CheckpointStore


def test_the_newest_is_found_and_only_the_last_few_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    for step in (1, 2, 10):
        store.save(step, state={"step": step})
    assert store.steps() == [10, 2]
    latest = store.latest()
    assert (latest.step, latest.state()) == (10, {"step": 10})


def test_a_broken_newest_is_passed_over_and_said_so(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, state={"step": 1})
    newest = store.save(2, state={"step": 2})
    (newest.directory / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert store.latest().step == 1
    assert "state.json is broken" in caplog.text


def test_a_save_that_fails_keeps_what_was_there(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, state={"step": 1})

    def fail(directory):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        store.save(2, state={"step": 2}, write_files=fail)
    assert store.steps() == [1]
    assert store.latest().state() == {"step": 1}


def test_a_writer_that_died_leaves_nothing_that_counts(tmp_path):
    partial = tmp_path / ".partial-step-00000007-abcd"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    unfinished = tmp_path / "step-00000009"
    unfinished.mkdir()
    store = CheckpointStore(tmp_path)
    assert not partial.exists()
    assert store.latest() is None


def test_other_files_are_written_with_the_state(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(3, state={}, write_files=lambda directory: (directory / "extra").write_text("x") and None)
    assert (store.latest().directory / "extra").read_text() == "x"


def test_keep_is_checked(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
