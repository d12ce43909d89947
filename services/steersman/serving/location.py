"""Where a checkpoint is: a local folder as it is, or a model of the Hugging Face hub as a local snapshot.

Whatever reads a model reads the same folder, so that a branch of the hub that moves on meanwhile cannot give two
readers different models. What looks like a path is never asked of the hub: a slip of the pen would wait for a network.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES: Final = ["*.json", "*.jinja", "*.txt", "*.model"]
_MODEL_FILES: Final = ["*.safetensors", *_TOKENIZER_FILES]
"""Weights, configuration, chat template and tokenizer: nothing that is run or unpickled."""
_UNWANTED: Final = ["*/*", "consolidated*"]
"""Other formats of the same weights (`onnx/`, `original/`, Mistral's own), which would double the download."""

# A hub that answers does so within a second or two; without a network nobody should wait for minutes.
HUB_SECONDS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Location:
    """The folder to read, the name that callers see if nobody chose another, and the commit of a hub model."""

    folder: Path
    name: str
    commit: str | None = None


def locate(field: str, model: str, revision: str | None = None) -> Location:
    """Finds `model`, a folder or a hub id, and downloads what is missing of the latter.

    `field` names the setting in errors. Raises `ValueError` with the setting, its value and what is allowed: at once
    for a path, and within about `HUB_SECONDS` for a hub id that cannot be had.
    """
    found = _locate(field, model, revision, _MODEL_FILES)
    if not (found.folder / "config.json").is_file():
        raise _not_there(field, model, "holds no config.json")
    return found


def locate_tokenizer(field: str, source: str, revision: str | None = None) -> Location:
    """As `locate`, for a tokenizer alone: no weights are downloaded, and a configuration need not be there."""
    return _locate(field, source, revision, _TOKENIZER_FILES)


def _locate(field: str, source: str, revision: str | None, wanted: list[str]) -> Location:
    folder = _expand(source)
    if folder is not None and folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision: is {revision!r}, allowed: none for a folder, which {field} {source!r} is")
        return Location(folder=folder, name=folder.resolve().name)
    if folder is not None and folder.exists():
        raise _not_there(field, source, "is no folder")
    if folder is None or source.startswith("~") or not _HUB_ID.fullmatch(source):
        raise _not_there(field, source, "does not exist")
    return _from_hub(field, source, revision, wanted)


def _expand(source: str) -> Path | None:
    """The path that `source` would be, None if it can be none."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        return None
    return path


def _from_hub(field: str, model: str, revision: str | None, wanted: list[str]) -> Location:
    # Only here: a local folder needs none of it.
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    # The hub's client lets through whatever its HTTP library raises, and that library changes with its version.
    unreachable: Exception | None = None
    try:
        commit = huggingface_hub.HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS).sha
    except Exception as error:
        commit, unreachable = revision, error
    try:
        snapshot = huggingface_hub.snapshot_download(
            model,
            revision=commit,
            allow_patterns=wanted,
            ignore_patterns=_UNWANTED,
            local_files_only=unreachable is not None,
        )
    except Exception as error:
        cause = unreachable or error
        first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        at = f" at revision {revision!r}" if revision else ""
        tried = f"is no folder, is not in the local cache, and cannot be had from the hub{at}: {first_line}"
        raise _not_there(field, model, tried) from cause
    folder = Path(snapshot)
    return Location(folder=folder, name=model, commit=folder.name)


def _not_there(field: str, model: str, fault: str) -> ValueError:
    allowed = "a checkpoint folder, or the id of a model on the hub"
    return ValueError(f"{field}: is {model!r}, which {fault}; allowed: {allowed}")
