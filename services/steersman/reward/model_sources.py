"""Which models callers may have loaded: nothing, until the settings name folders or hub ids."""

import fnmatch
from pathlib import Path

from steersman.reward.settings import LiveModelsSettings
from steersman.wire.errors import Reason, SteersmanError, invalid_field


def check_source(source: str, revision: str, settings: LiveModelsSettings) -> str:
    """The folder or hub id that a caller's `source` means.

    A relative folder is looked for below each root, and from where the server was started.

    Links are followed before the folder is compared with the roots. Raises PERMISSION_DENIED for what the settings do
    not allow, whether it exists or not, and INVALID_FIELD for an allowed folder without a model in safetensors files.
    """
    if not settings.roots and not settings.hub_ids:
        message = "this server loads no models by request: models.roots and models.hub_ids are empty in its settings"
        raise SteersmanError(Reason.PERMISSION_DENIED, message)
    if any(fnmatch.fnmatchcase(source, allowed) for allowed in settings.hub_ids) and _looks_like_hub_id(source):
        return source
    folder = _below_a_root(source, settings.roots)
    if folder is None:
        message = f"source is {source!r}, allowed: a folder below models.roots or an id of models.hub_ids of the server"
        raise SteersmanError(Reason.PERMISSION_DENIED, message)
    if revision:
        raise invalid_field("revision", revision, "none for a folder")
    # Pickled weights would run what their author wrote.
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise invalid_field("source", source, "a folder with config.json and safetensors files")
    return str(folder)


def _below_a_root(source: str, roots: list[Path]) -> Path | None:
    """The folder below a root, if there is one; else where below a root it would be; None for outside of all."""
    if not source or "\0" in source:
        return None
    homes = [root.expanduser().resolve() for root in roots]
    folders = [
        folder
        for home in homes
        for folder in ((home / source).resolve(), Path(source).resolve())
        if folder.is_relative_to(home) and folder != home
    ]
    return next((folder for folder in folders if folder.is_dir()), folders[0] if folders else None)


def _looks_like_hub_id(source: str) -> bool:
    """Whether it cannot be taken for a path: a name, or two with a slash between."""
    parts = source.split("/")
    return len(parts) <= 2 and all(part and not part.startswith((".", "~")) for part in parts)
