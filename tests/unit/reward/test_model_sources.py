"""Which models callers may have loaded."""

from pathlib import Path

import pytest

from steersman.reward.model_sources import check_source
from steersman.reward.settings import LiveModelsSettings
from steersman.wire.errors import Reason, SteersmanError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/models/m", "b/m", "outside/m"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "model.safetensors").touch()
    (tmp_path / "a" / "way-out").symlink_to(tmp_path / "outside")
    return tmp_path


def settings(root: Path, *roots: str, hub_ids: list[str] | None = None) -> LiveModelsSettings:
    return LiveModelsSettings(roots=[root / name for name in roots], hub_ids=hub_ids or [])


def test_a_folder_is_named_in_full_or_from_a_root_or_from_where_the_server_started(root, monkeypatch):
    allowed = settings(root, "a", "b")
    assert check_source(str(root / "a" / "models" / "m"), "", allowed) == str(root / "a" / "models" / "m")
    assert check_source("models/m", "", allowed) == str(root / "a" / "models" / "m")
    assert check_source("m", "", allowed) == str(root / "b" / "m")
    monkeypatch.chdir(root)
    assert check_source("b/m", "", allowed) == str(root / "b" / "m")


@pytest.mark.parametrize(
    "source", ["", ".", "..", "../outside/m", "way-out/m", "/", "/etc/passwd", "a\0b", "x/../../outside/m"]
)
def test_what_is_outside_is_refused_whether_it_exists_or_not(root, source):
    with pytest.raises(SteersmanError) as raised:
        check_source(source, "", settings(root, "a"))
    assert raised.value.reason is Reason.PERMISSION_DENIED


def test_a_root_that_is_a_link_counts_as_what_it_leads_to(root):
    assert check_source("m", "", settings(root, "a/way-out")) == str(root / "outside" / "m")


@pytest.mark.parametrize("removed", ["config.json", "model.safetensors"])
def test_a_folder_that_holds_no_model_is_a_bad_field(root, removed):
    (root / "b" / "m" / removed).unlink()
    with pytest.raises(SteersmanError, match="a folder with config.json and safetensors files") as raised:
        check_source("m", "", settings(root, "b"))
    assert raised.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize(
    ("source", "is_allowed"),
    [
        ("org/model", True),
        ("org/other", False),
        ("lab/anything", True),
        ("lab/../../etc", False),
        ("lab/", False),
        ("lab", False),
        ("model", True),
    ],
)
def test_hub_ids_are_those_of_the_settings(root, source, is_allowed):
    allowed = settings(root, hub_ids=["org/model", "lab/*", "model"])
    if is_allowed:
        assert check_source(source, "main", allowed) == source
        return
    with pytest.raises(SteersmanError) as raised:
        check_source(source, "", allowed)
    assert raised.value.reason is Reason.PERMISSION_DENIED


def test_nothing_is_allowed_until_the_settings_say_so(root):
    with pytest.raises(SteersmanError, match=r"models\.roots and models\.hub_ids are empty") as raised:
        check_source(str(root / "a" / "models" / "m"), "", LiveModelsSettings())
    assert raised.value.reason is Reason.PERMISSION_DENIED
