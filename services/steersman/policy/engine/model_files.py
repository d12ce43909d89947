"""What the files of a Hugging Face checkpoint folder say, read without loading a model."""

import json
from pathlib import Path
from typing import Any, Final

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a response, ascending: those of generation_config.json, else of config.json. May be
    empty.
    """
    for name in ("generation_config.json", "config.json"):
        match _read(folder / name).get("eos_token_id"):
            case int(only):
                return (only,)
            case list(several):
                return tuple(sorted(int(token) for token in several))
    return ()


def dtype(folder: Path) -> str:
    """Element type of the checkpoint as config.json names it, for example "bfloat16"; "auto" if it does not.

    vLLM's own "auto" would turn float32 into bfloat16, and the policy would no longer be what is trained.
    """
    config = _read(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "auto").removeprefix("torch.")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
