"""What a vLLM engine is started with, and the environment that it needs before vLLM is imported."""

from dataclasses import dataclass
from pathlib import Path

from steersman.serving import vllm_environment


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Machines that run one engine together; node 0 schedules and serves, the others compute for it.

    count: how many; rank: which of them this is, from 0.
    address, port: where node 0 is met by the others (torch.distributed).
    """

    count: int
    rank: int
    address: str
    port: int


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
    tensor_parallel_size: accelerators that share each layer; pipeline_parallel_size: groups of them that share the
        layers.
    nodes: how the accelerators are spread over machines.
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
    pipeline_parallel_size: int = 1
    nodes: Nodes | None = None
    num_threads: int | None = None
    separate_worker: bool = False
    enforce_eager: bool = False
    load_chunk_bytes: int = 4 * 1024 * 1024
    seed: int = 0


def prepare_environment(options: EngineOptions, *, on_cpu: bool) -> None:
    """Sets what vLLM and OpenMP read from the environment. Call it before torch or vLLM is imported.

    Variables that are set already win, except those that the options speak of.
    """
    vllm_environment.prepare(on_cpu=on_cpu, num_threads=options.num_threads, separate_processes=options.separate_worker)
