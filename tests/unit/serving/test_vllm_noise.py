"""What vLLM says that means something stays."""

import logging
import warnings

import pytest

from steersman.serving import vllm_noise


def test_only_what_is_meaningless_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        vllm_noise.silence()
        vllm_noise.silence()
    logger = logging.getLogger("vllm.utils.torch_utils")
    logger.warning("OMP_NUM_THREADS=%s is set; leaving Torch threads at %d", 1, 1)
    logger.warning("OMP_NUM_THREADS is invalid; defaulting Torch threads to %d.", 2)
    logger.error("OMP_NUM_THREADS=%s is set, and that is an error", 1)
    logging.getLogger("vllm.elsewhere").warning("OMP_NUM_THREADS=%s is set; leaving it", 1)
    assert [record.getMessage() for record in caplog.records] == [
        "OMP_NUM_THREADS is invalid; defaulting Torch threads to 2.",
        "OMP_NUM_THREADS=1 is set, and that is an error",
        "OMP_NUM_THREADS=1 is set; leaving it",
    ]
    assert len(logger.filters) == 1
