"""Settings of the policy service."""

from typing import Literal, Self

from pydantic import Field, model_validator

from steersman.policy.engine.options import EngineOptions, Nodes
from steersman.policy.engine.port import KvCachePolicy
from steersman.policy.weights.relay import RelayRules
from steersman.serving.location import Location
from steersman.serving.security.peer import PeerCredentials
from steersman.serving.settings import ServerSettings


class PolicySettings(ServerSettings):
    """Serves a causal language model for sampling, and takes new weights while it serves."""

    port: int = Field(50051, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        9051, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one, none is off."
    )
    model: str = Field(
        min_length=1, description="Folder of a Hugging Face checkpoint with safetensors, or the id of one on the hub."
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit; none takes the newest.")
    served_model_name: str = Field("", description="Name that callers see; empty takes the folder's or the hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Element type to compute in; auto takes the checkpoint's."
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Longest sequence in tokens, prompt and response together; none takes the model's."
    )
    max_num_seqs: int = Field(128, ge=1, le=4096, description="Samples that decode together.")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Tokens of one engine step; none takes vLLM's.")
    max_queue_samples: int = Field(
        4096, ge=1, description="Samples running or waiting at once; more are refused with RESOURCE_EXHAUSTED."
    )
    kv_cache_mib: int | None = Field(
        None, ge=1, description="Key-value cache in MiB; none is 1024 on CPU and what is left on a GPU."
    )
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory to use.")
    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="GPUs that share each layer.")
    pipeline_parallel_size: int = Field(1, ge=1, le=1024, description="Groups of these that share the layers.")
    nnodes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Machines that run one replica together, without Ray; each has an equal share of the GPUs, and all "
        "have the same settings but for node_rank.",
    )
    node_rank: int = Field(
        0, ge=0, description="Which of them this is. 0 serves; the others compute for it, and answer health alone."
    )
    master_addr: str | None = Field(None, description="Name or address of node 0 as the others reach it.")
    master_port: int = Field(
        29501, ge=1, le=65534, description="Port of node 0 that the others meet it at; the next one is used too."
    )
    num_threads: int | None = Field(
        None, ge=1, description="Threads of the engine on CPU; none takes OMP_NUM_THREADS, else every core."
    )
    separate_worker: bool = Field(
        False, description="On CPU, run the model in a process of its own beside the scheduler."
    )
    enforce_eager: bool = Field(False, description="On GPU, do without CUDA graphs.")
    kv_cache_policy: KvCachePolicy = Field(
        KvCachePolicy.KEEP,
        description="What running requests do at a change of weights: keep their cache, or recompute it.",
    )
    load_chunk_bytes: int = Field(
        4 * 1024 * 1024, ge=4096, description="Weights moved between two engine steps while new ones are staged."
    )
    relay: bool = Field(True, description="Pass new weights on to other replicas when the trainer asks for it.")
    relay_targets: tuple[str, ...] = Field(
        ("*",), description="Patterns of host:port that weights may be passed on to, such as 10.1.*:50051."
    )
    relay_credentials: PeerCredentials | None = Field(
        None, description="What this replica shows to those that it passes weights on to; none is in the clear."
    )
    relay_stall_seconds: float = Field(
        10.0,
        gt=0,
        le=600,
        description="How long a replica that weights are passed on to may hold up the others before it is given up. At "
        "most half of the idle timeout of pushes, which is 20 s for those of PPO jobs.",
    )
    seed: int = Field(0, ge=0, description="Start of the random numbers for requests without a seed.")

    nodes_in_clear: bool = Field(
        False,
        description="Let the machines of a replica talk as vLLM does: in the clear, on many ports, and believing all "
        "who reach one. Needed for nnodes above 1 beyond loopback; only where nobody else reaches these ports.",
    )

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        num_gpus = self.tensor_parallel_size * self.pipeline_parallel_size
        if num_gpus % self.nnodes:
            raise ValueError(
                f"nnodes is {self.nnodes}, allowed: a divisor of the {num_gpus} GPUs (tensor_parallel_size times "
                "pipeline_parallel_size)"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank is {self.node_rank}, allowed: below nnodes, which is {self.nnodes}")
        if self.nnodes > 1 and not self.master_addr:
            raise ValueError("master_addr is not set, allowed: the name or address of node 0 where nnodes is above 1")
        if self.nnodes > 1 and not self.nodes_in_clear and self.master_addr not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(
                f"master_addr is {self.master_addr}, where vLLM talks in the clear to all who reach it; allowed: "
                "loopback, or with nodes_in_clear, where nobody else does (a NetworkPolicy)"
            )
        return self

    def nodes(self) -> Nodes | None:
        """The machines of this replica; None if it has one alone."""
        if self.nnodes == 1 or self.master_addr is None:
            return None
        return Nodes(count=self.nnodes, rank=self.node_rank, address=self.master_addr, port=self.master_port)

    def relay_rules(self) -> RelayRules:
        """What this replica passes on."""
        return RelayRules(enabled=self.relay, targets=self.relay_targets, stall_seconds=self.relay_stall_seconds)

    def engine_options(self, location: Location, *, on_cpu: bool) -> EngineOptions:
        """How to start the engine on the checkpoint that `model` led to."""
        kv_cache_mib = self.kv_cache_mib or (1024 if on_cpu else None)
        return EngineOptions(
            model=location.folder,
            served_name=self.served_model_name or location.name,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_bytes=kv_cache_mib * 2**20 if kv_cache_mib else None,
            gpu_memory_fraction=self.gpu_memory_fraction,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            nodes=self.nodes(),
            num_threads=self.num_threads,
            separate_worker=self.separate_worker,
            enforce_eager=self.enforce_eager,
            load_chunk_bytes=self.load_chunk_bytes,
            seed=self.seed,
        )
