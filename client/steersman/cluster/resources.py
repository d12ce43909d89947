"""What a training job needs of a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class JobResources:
    """What a job needs; zero and empty mean the launcher's default."""

    num_processes: int = 0
    processes_per_node: int = 0
    gpus_per_process: int = 0
    cpus_per_process: float = 0.0
    memory_bytes_per_process: int = 0
    queue_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    image: str = ""

    @property
    def on_one_node(self) -> int:
        """Processes of each node."""
        return self.processes_per_node or max(1, self.num_processes)

    @property
    def num_nodes(self) -> int:
        """Nodes that the processes are spread over."""
        return max(1, self.num_processes) // self.on_one_node
