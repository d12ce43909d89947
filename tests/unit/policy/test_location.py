"""Folders and hub ids, with a hub that is a function."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from steersman.policy.engine.location import Location, locate


class FakeHub:
    """Answers `snapshot_download` with a folder, or with `error`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, repo_id: str, *, revision: str | None, **patterns: Any) -> str:
        self.asked.append((repo_id, revision))
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_is_itself(hub: FakeHub, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "runs" / "model")
    assert locate(str(folder)) == Location(folder=folder, name="model")
    assert locate("runs/model") == Location(folder=Path("runs/model"), name="model")
    assert hub.asked == []


@pytest.mark.parametrize("model", ["gpt2", "org/name-0.5B"])
def test_a_hub_id_is_its_snapshot_and_keeps_its_name(hub: FakeHub, model: str) -> None:
    assert locate(model, "main") == Location(folder=hub.folder, name=model)
    assert hub.asked == [(model, "main")]


@pytest.mark.parametrize("model", ["/no/such", "./no-such", "../x", "a/b/c", "~/no-such-folder", "a b"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(hub: FakeHub, model: str) -> None:
    with pytest.raises(ValueError, match="which does not exist; allowed: a folder with config.json") as caught:
        locate(model)
    assert str(caught.value).startswith(f"model is {model!r}")
    assert hub.asked == []


def test_a_folder_without_a_model_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        locate(str(tmp_path))


def test_a_folder_has_no_revision(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision is 'v1', allowed: none for a folder"):
        locate(str(make_model(tmp_path / "m")), "v1")


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("offline\nmore"), FileNotFoundError("offline"), ValueError("offline")]
)
def test_a_hub_that_refuses_is_quoted(hub: FakeHub, error: Exception) -> None:
    hub.error = error
    with pytest.raises(ValueError, match="model is 'org/name', which .* at revision 'v1': offline; allowed") as caught:
        locate("org/name", "v1")
    assert caught.value.__cause__ is error
