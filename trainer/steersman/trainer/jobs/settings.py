"""Settings of the trainer service."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from steersman.cluster.settings import KubernetesSettings
from steersman.serving.settings import ServerSettings


class TrainerSettings(ServerSettings):
    """Settings of TrainerService."""

    port: int = Field(50054, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        9054, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one, none is off."
    )
    runs_directory: Path = Field(
        Path("runs"), description="Folder of the run folders and of the database that knows all jobs."
    )
    max_running_jobs: int = Field(
        4, ge=1, le=1000, description="Jobs running at once; more are refused with QUEUE_FULL."
    )
    cancel_grace_seconds: float = Field(
        60.0, ge=0, le=3600, description="Time for a cancelled job to write its checkpoint, then it is killed."
    )
    max_attempts: int = Field(
        1,
        ge=1,
        le=100,
        description="Starts of a job whose worker dies without a word (killed, out of memory) before the job fails; "
        "each goes on from the last checkpoint.",
    )
    launcher: Literal["local", "kubernetes"] = Field(
        "local", description="Where jobs run: as processes of this machine, or as Kubernetes Jobs."
    )
    kubernetes: KubernetesSettings | None = Field(None, description="The cluster, for launcher kubernetes.")

    @model_validator(mode="after")
    def _cluster_is_described(self) -> Self:
        if self.launcher == "kubernetes" and self.kubernetes is None:
            raise ValueError("kubernetes: is none; launcher kubernetes needs its image and run_claim at least")
        return self
