"""A machine where vLLM finds nothing to compute on, such as a GPU node without its GPU."""

from pathlib import Path

import pytest
from vllm.platforms.interface import UnspecifiedPlatform

from steersman.policy.engine import config
from steersman.policy.engine.options import EngineOptions


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "current_platform", UnspecifiedPlatform())
    with pytest.raises(RuntimeError, match=r"no device.*nvidia-smi.*policy-cpu"):
        config.engine_config(EngineOptions(model=tmp_path))
