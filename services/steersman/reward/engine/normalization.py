"""The normalisation stored beside a checkpoint: `reward_normalization.json`.

    {"version": 1, "mean": 0.81, "std": 1.93, "num_responses": 512, "reference": "chosen responses of the comparisons"}

Score = (raw - mean) / std. Other keys say where the numbers come from, for people.
"""

import json
import math
from pathlib import Path
from typing import Any, Final

from steersman.reward.engine.port import Normalization

FILE_NAME: Final = "reward_normalization.json"
_VERSION: Final = 1


def stored_normalization(field: str, folder: Path) -> Normalization | None:
    """The normalisation beside a checkpoint; None if there is none.

    `ValueError` that names `field` if the file cannot be used: scores on an unknown scale are worse than none.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}: its {FILE_NAME} cannot be read: {error}") from None
    return _checked(field, values)


def _checked(field: str, values: Any) -> Normalization:
    allowed = f'allowed: an object with "version" {_VERSION}, and numbers "mean" and "std", finite, and std above 0'
    if not isinstance(values, dict) or values.get("version") != _VERSION:
        raise ValueError(f"{field}: its {FILE_NAME} is of another form, {allowed}")
    mean, std = (_number(values.get(name)) for name in ("mean", "std"))
    if mean is None or std is None or std <= 0:
        told = f"mean {values.get('mean')!r} and std {values.get('std')!r}"
        raise ValueError(f"{field}: its {FILE_NAME} says {told}, {allowed}")
    return Normalization(mean=mean, std=std)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
