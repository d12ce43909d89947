"""Where the checkpoint is: a local folder as it is, or a model of the Hugging Face hub as a local snapshot.

vLLM, the weight store and the tokenizer all read the same folder, so that a branch of the hub that moves on while
the service starts cannot give them different models.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED: Final = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
"""Weights, configuration, chat template and tokenizer: nothing that is run or unpickled."""
_UNWANTED: Final = ["*/*", "consolidated*"]
"""Other formats of the same weights (`onnx/`, `original/`, Mistral's own), which would double the download."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """The folder to read, and the name that callers see if nobody chose another."""

    folder: Path
    name: str


def locate(model: str, revision: str | None = None) -> Location:
    """Finds `model`, a folder or a hub id; downloads what is missing of the latter.

    Raises `ValueError` naming the setting, its value and what is allowed.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise _not_there(model, "holds no config.json")
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, allowed: none for a folder, which model {model!r} is")
        return Location(folder=folder, name=folder.resolve().name)
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise _not_there(model, "does not exist")
    return Location(folder=_download(model, revision), name=model)


def _download(model: str, revision: str | None) -> Path:
    # Only here: a local folder needs none of it.
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        snapshot = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except (OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        at = f" at revision {revision!r}" if revision else ""
        raise _not_there(model, f"is no folder and cannot be had from the hub{at}: {first_line}") from error
    return Path(snapshot)


def _not_there(model: str, fault: str) -> ValueError:
    allowed = "a folder with config.json and model.safetensors or its shards, or the id of such a model on the hub"
    return ValueError(f"model is {model!r}, which {fault}; allowed: {allowed}")
