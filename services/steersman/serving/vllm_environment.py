"""What vLLM reads from the environment, for every service that runs it. Imports neither vLLM nor torch.

vLLM reads its variables when it is imported, OpenMP when torch is: call `prepare` before either.
"""

import contextlib
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from steersman.serving import vllm_noise

BLOCK_TOKENS: Final = 32
"""Tokens of a key-value cache block: vLLM's CPU attention wants multiples of 32, and its GPU kernels accept it."""

_DEFAULTS: Final = {
    # Nobody should find their training run reported to a third party.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Its log records then reach our handlers and have our format, those of its processes included.
    "VLLM_CONFIGURE_LOGGING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare(*, on_cpu: bool, num_threads: int | None = None, separate_processes: bool = False) -> None:
    """Sets the variables. Those that are set already win, except where an argument speaks of them.

    num_threads: OpenMP threads on CPU; None takes what is set, else all usable cores.
    separate_processes: on CPU, run the engine beside this process rather than within it.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
    vllm_noise.silence()
    if on_cpu:
        # Eager execution costs no throughput on CPU, and the first request does not wait 10 s for a compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if separate_processes else "0"
        # Bound to cores, vLLM would keep one of them free for its scheduler, which sleeps while the model works.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Without a limit OpenMP takes every core of the host, and throughput collapses in a container.
        threads = num_threads or len(os.sched_getaffinity(0))
        if num_threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def runs_on_cpu() -> bool:
    """Whether vLLM will run on CPU: its CPU build is installed, or there is no accelerator. Imports neither."""
    with contextlib.suppress(PackageNotFoundError):
        version("vllm-cpu")
        return True
    return not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
