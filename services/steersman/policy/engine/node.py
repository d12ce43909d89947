"""The part of an engine that runs on another machine than its scheduler: workers, and nothing that serves."""

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from steersman.policy.engine import orphans
from steersman.policy.engine.bond import Bond
from steersman.policy.engine.config import engine_config
from steersman.policy.engine.options import EngineOptions
from steersman.policy.engine.port import EngineDeadError


class WorkerNode:
    """The workers of this machine."""

    def __init__(self, executor: MultiprocExecutor, bond: Bond) -> None:
        self._executor = executor
        self._bond = bond

    def check_health(self) -> None:
        """Raises `EngineDeadError` when a worker has died, or node 0."""
        if self._executor.is_failed:
            raise EngineDeadError("a worker process died")
        self._bond.check()

    def shutdown(self) -> None:
        """Ends the workers."""
        self._bond.close()
        self._executor.shutdown()


def start_node(options: EngineOptions) -> WorkerNode:
    """Starts the workers of this machine and waits until they have met node 0 and loaded their share of the model.
    `prepare_environment` comes first. Raises what vLLM raises when they cannot start.
    """
    assert options.nodes is not None
    config = engine_config(options)
    with orphans.forks_end_with_us():
        executor = MultiprocExecutor(config)
    try:
        return WorkerNode(executor, Bond(options.nodes))
    except OSError:
        executor.shutdown()
        raise
