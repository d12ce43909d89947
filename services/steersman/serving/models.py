"""What the services that run a Hugging Face model themselves share: where it is, what it computes with, its limits.

Imports torch and transformers; a server imports it only after its settings are known to be good.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from steersman.serving import linear
from steersman.serving.location import locate, locate_tokenizer
from steersman.serving.tokenization import trusted

logger = logging.getLogger(__name__)

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

# Stands for "no limit stated" where a configuration has none: longer than any message that could arrive.
UNLIMITED_TOKENS: Final = 2**24

# Any of these makes a tokenizer; without one of them transformers makes up an empty one.
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

_CGROUP_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that was found: the folder to load it from, a name for callers, and its revision."""

    source: str
    name: str
    revision: str


def find_checkpoint(field: str, model: str, revision: str | None = None) -> Checkpoint:
    """Finds a local folder or a hub model; `field` names the setting in errors.

    The revision of a hub model is its commit; that of a folder is a digest of its weights and configuration, so two
    folders have the same revision only if they compute the same.

    Raises `ValueError` if there is no such model.
    """
    found = locate(field, model, revision)
    return Checkpoint(source=str(found.folder), name=found.name, revision=found.commit or digest_folder(found.folder))


def load_pretrained(field: str, auto_class: Any, found: Checkpoint, dtype: str, device: torch.device) -> Any:
    """A frozen model by one of transformers' auto classes, on `device`; `field` names the setting in errors.

    Raises `ValueError` if it cannot be loaded, or lacks weights, which transformers would fill with random numbers.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, loading = auto_class.from_pretrained(
            found.source, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{field}: cannot be loaded by {auto_class.__name__}: {error}") from None
    missing = sorted(loading["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5])
        raise ValueError(f"{field}: lacks the weights {shown}, allowed: a whole checkpoint, its head included")
    model = own_weights(model.to(device).eval().requires_grad_(False))
    linear.speed_up(model)
    return model


def own_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, with its weights in memory of its own.

    On a CPU they are pages of the checkpoint's files: whoever writes a new checkpoint over them would change what is
    served, under the old revision, or end the process where a file gets shorter.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer in a checkpoint folder or of a hub model; None if it has none, or none that can be read.

    Raises `ValueError` if there is no such folder or hub model.
    """
    folder = locate_tokenizer("tokenizer", source, revision).folder
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return trusted(AutoTokenizer.from_pretrained(folder), folder)
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("no tokenizer could be loaded from %s", source, exc_info=True)
        return None


def digest_folder(folder: Path) -> str:
    """SHA-256 over what a checkpoint computes with, shortened to 16 hexadecimal digits.

    That is its weight files, its configuration, and the normalisation of its scores if one was fitted.
    """
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("reward_normalization.json")])

    def digest(path: Path) -> bytes:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()

    whole = hashlib.sha256()
    # Hashing releases the interpreter lock: shards are read side by side.
    with ThreadPoolExecutor(max_workers=4) as pool:
        for path, part in zip(files, pool.map(digest, files), strict=True):
            whole.update(path.name.encode() + b"\0" + part)
    return f"sha256:{whole.hexdigest()[:16]}"


def choose_device(field: str, device: str) -> torch.device:
    """The device to compute on; "auto" is the first GPU if there is one. `ValueError` if it is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"{field}: is {device!r}, allowed: auto or a device that is there: {first_line}") from None
    return chosen


def use_threads(num_threads: int | None) -> int:
    """Sets the threads of one torch operation and returns their number.

    Default: what OMP_NUM_THREADS says, else the physical cores this process may use. More threads than cores is the
    one setting that makes small models several times slower.
    """
    if num_threads is None and "OMP_NUM_THREADS" not in os.environ:
        num_threads = usable_cores()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def usable_cores() -> int:
    """Physical cores, within the CPU affinity and the CPU quota of the container."""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    try:
        quota, period = _CGROUP_CPU_MAX.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def sequence_limit(config: Any, asked: int | None) -> int:
    """Longest sequence in tokens: the model's own limit, or a lower one that was asked for."""
    text_config = config.get_text_config()
    own = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "n_positions", None)
    return min(own or UNLIMITED_TOKENS, asked or UNLIMITED_TOKENS)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Ids that end a response, as the generation settings of the model say, else its configuration."""
    stated = getattr(model, "generation_config", None)
    return config_eos_token_ids(stated) or config_eos_token_ids(model.config.get_text_config())


def config_eos_token_ids(config: Any) -> tuple[int, ...]:
    """Ids that end a response, as one configuration says."""
    found = getattr(config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def pad_token_id(config: Any) -> int:
    """An id to pad with that every embedding has."""
    found = getattr(config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) and 0 <= found < config.get_text_config().vocab_size else 0


def pad_rows(rows: Sequence[NDArray[np.int32]], pad_id: int, device: torch.device) -> torch.Tensor:
    """Token ids [rows, longest], int64, padded on the right.

    A causal model needs no attention mask for it: no token looks at what comes after it, and what the padding itself
    computes is never read. Without a mask the fastest attention kernels apply.
    """
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded).to(device, non_blocking=True)
