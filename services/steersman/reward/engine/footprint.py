"""Whether a model fits into the memory that is free, before it is loaded beside others that serve."""

from pathlib import Path
from typing import Any, Final

import psutil
import torch
from transformers import AutoConfig

from steersman.reward.settings import ModelScorerSettings
from steersman.serving.location import locate
from steersman.serving.models import choose_device

_GIB: Final = 2**30
_CGROUP: Final = Path("/sys/fs/cgroup")


def check_memory(field: str, settings: ModelScorerSettings, reserve: float) -> None:
    """`ValueError` if the weights of a checkpoint need more than is free, less the share `reserve` of that."""
    needed = weight_bytes(locate(f"{field}.model", settings.model, settings.revision).folder, settings.dtype)
    device = choose_device(f"{field}.device", settings.device)
    free = int(free_bytes(device) * (1.0 - reserve))
    if needed > free:
        told = f"{needed / _GIB:.2f} GiB of weights, allowed: {free / _GIB:.2f} GiB that are free on {device.type}"
        raise ValueError(f"{field}.model: has {told}, less a reserve of {reserve:.0%}")


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of a checkpoint's weights when they are computed in `dtype`."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if dtype == "auto":
        return stored
    config: Any = AutoConfig.from_pretrained(folder)
    of_file = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    wanted: torch.dtype = getattr(torch, dtype)
    return stored * wanted.itemsize // of_file.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on a device; on the CPU within the limit of the container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            # File caches count as used, and are given back when memory is short.
            stats = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            used = int((_CGROUP / "memory.current").read_text()) - int(stats.get("inactive_file", 0))
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(0, free)
