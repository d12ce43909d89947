"""Settings of the reference server."""

from typing import Literal

from pydantic import Field

from steersman.serving.batching import BatchingSettings
from steersman.serving.settings import ServerSettings


class ReferenceSettings(ServerSettings):
    """Log-probs under a frozen causal language model, over gRPC."""

    port: int = Field(50052, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        9052, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one, none is off."
    )
    model: str = Field(min_length=1, description="Checkpoint folder in Hugging Face layout, or hub id.")
    revision: str | None = Field(None, description="Hub revision. Default: the newest.")
    name: str | None = Field(None, description="Name that callers are told. Default: folder name or hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What the model computes in. Default: the dtype of the checkpoint."
    )
    device: str = Field("auto", description="Torch device. Default: the first GPU, else the CPU.")
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of a CPU operation. Default: OMP_NUM_THREADS, else physical cores."
    )
    max_sequence_tokens: int | None = Field(
        None, ge=2, description="Longest sequence accepted, in tokens. Default: what the model can."
    )
    logits_chunk_mib: int = Field(
        32, ge=1, le=65536, description="Memory for the float32 logits that exist at once, in MiB."
    )
    stall_seconds: float = Field(
        300.0, gt=0, description="Unhealthy when one batch takes longer than this, in seconds."
    )
    batching: BatchingSettings = Field(default_factory=BatchingSettings, description="Batching across callers.")
