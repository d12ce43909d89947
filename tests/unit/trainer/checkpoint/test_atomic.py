import json

import pytest

from steersman.trainer.checkpoint import atomic
from steersman.trainer.checkpoint.atomic import MANIFEST, CheckpointError, atomic_directory, read_manifest, verify


def write(target, text="hello", metadata=None):
    with atomic_directory(target, metadata=metadata) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "a.txt").write_text(text)


def test_a_written_directory_verifies_and_carries_its_metadata(tmp_path):
    write(tmp_path / "one", metadata={"step": 3})
    manifest = verify(tmp_path / "one")
    assert manifest["metadata"] == {"step": 3}
    assert manifest["files"]["sub/a.txt"]["size_bytes"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_an_error_leaves_nothing_new_and_the_old_in_place(tmp_path):
    write(tmp_path / "one", "old")
    with pytest.raises(TypeError):
        write(tmp_path / "one", text=None)
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    verify(tmp_path / "one")
    assert (tmp_path / "one" / "sub" / "a.txt").read_text() == "old"


def test_replaces_an_earlier_directory(tmp_path):
    write(tmp_path / "one", "old")
    write(tmp_path / "one", "new")
    verify(tmp_path / "one")
    assert (tmp_path / "one" / "sub" / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_nothing_is_under_its_name_before_everything_is_on_disk(tmp_path, monkeypatch):
    seen = []
    sync = atomic._sync_file
    monkeypatch.setattr(
        atomic, "_sync_file", lambda path: (seen.append((path.name, (tmp_path / "one").exists())), sync(path))
    )
    write(tmp_path / "one")
    assert seen == [("a.txt", False), (MANIFEST, False)]


def test_a_file_that_was_cut_changed_or_lost_is_named(tmp_path):
    write(tmp_path / "one", "hello")
    path = tmp_path / "one" / "sub" / "a.txt"
    path.write_text("hell")
    with pytest.raises(CheckpointError, match=r"a\.txt is broken: 4 bytes, must be 5"):
        verify(tmp_path / "one")
    path.write_text("jello")
    verify(tmp_path / "one", digests=False)
    with pytest.raises(CheckpointError, match="digest differs"):
        verify(tmp_path / "one")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"sub/a\.txt is missing"):
        verify(tmp_path / "one")


def test_without_a_readable_manifest_it_is_not_whole(tmp_path):
    write(tmp_path / "one")
    (tmp_path / "one" / MANIFEST).write_text('{"format": 1, "fil')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path / "one")
    (tmp_path / "one" / MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="unknown format"):
        read_manifest(tmp_path / "one")
    (tmp_path / "one" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_manifest(tmp_path / "one")
