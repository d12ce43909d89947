"""Folders and hub ids, with a hub of functions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from steersman.serving.location import HUB_SECONDS, Location, locate, locate_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Names a commit and gives its snapshot, unless it is out of reach."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.unreachable: Exception | None = None
        self.cached = False
        self.asked: list[tuple[str, str | None]] = []
        self.wanted: list[str] = []

    def model_info(self, model: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        assert 0 < timeout <= HUB_SECONDS
        self.asked.append((model, revision))
        if self.unreachable is not None:
            raise self.unreachable
        return SimpleNamespace(sha=COMMIT)

    def download(
        self, model: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str], **patterns: Any
    ) -> str:
        self.wanted = allow_patterns
        if local_files_only:
            assert self.unreachable is not None
            if not self.cached:
                raise FileNotFoundError("nothing cached")
        else:
            assert revision == COMMIT  # what the hub named, so that a moving branch gives one model
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(make_model(tmp_path / "cache" / COMMIT))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    monkeypatch.chdir(tmp_path)
    return fake


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_is_itself(hub: FakeHub, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "runs" / "model")
    assert locate("model", str(folder)) == Location(folder=folder, name="model")
    assert locate("model", "runs/model") == Location(folder=Path("runs/model"), name="model")
    assert hub.asked == []


@pytest.mark.parametrize("model", ["gpt2", "org/name-0.5B"])
def test_a_hub_id_is_its_snapshot_and_keeps_its_name(hub: FakeHub, model: str) -> None:
    assert locate("model", model, "main") == Location(folder=hub.snapshot, name=model, commit=COMMIT)
    assert hub.asked == [(model, "main")]


def test_a_tokenizer_needs_neither_weights_nor_a_configuration(hub: FakeHub, tmp_path: Path) -> None:
    assert locate_tokenizer("tokenizer", str(tmp_path)).folder == tmp_path
    locate_tokenizer("tokenizer", "gpt2")
    assert "*.safetensors" not in hub.wanted
    locate("model", "gpt2")
    assert "*.safetensors" in hub.wanted


@pytest.mark.parametrize(
    "model", ["/no/such", "./no-such", "../x", "a/b/c", "~/no-such-folder", "~nobody/x", "a b", "a\0b", "x" * 400 + "/"]
)
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(hub: FakeHub, model: str) -> None:
    with pytest.raises(ValueError, match="which does not exist; allowed: a checkpoint folder") as caught:
        locate("scorers.x.model", model)
    assert str(caught.value).startswith(f"scorers.x.model: is {model!r}")
    assert hub.asked == []


def test_a_folder_without_a_model_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        locate("model", str(tmp_path))


def test_a_file_is_no_folder(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="which is no folder"):
        locate("model", "model.safetensors")
    assert hub.asked == []


def test_a_folder_has_no_revision(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision: is 'v1', allowed: none for a folder"):
        locate("model", str(make_model(tmp_path / "m")), "v1")


def test_out_of_reach_the_cache_serves(hub: FakeHub) -> None:
    hub.unreachable, hub.cached = OSError("no network"), True
    assert locate("model", "org/name").folder == hub.snapshot


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("offline\nmore"), FileNotFoundError("offline"), ValueError("offline")]
)
def test_a_hub_that_refuses_is_quoted(hub: FakeHub, error: Exception) -> None:
    hub.unreachable = error
    expected = "model: is 'org/name', which is no folder, is not in the local cache, and .* at revision 'v1': offline;"
    with pytest.raises(ValueError, match=expected) as caught:
        locate("model", "org/name", "v1")
    assert caught.value.__cause__ is error
