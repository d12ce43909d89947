"""Builds the policy service: checkpoint, engine, weight store, handlers, servicers."""

import gc
from collections.abc import Sequence
from typing import Any

import grpc

from steersman.policy.engine.location import locate
from steersman.policy.engine.options import prepare_environment, runs_on_cpu
from steersman.policy.engine.port import EngineDeadError, GenerationEngine
from steersman.policy.handler import GenerationHandler
from steersman.policy.metrics import PolicyMetrics
from steersman.policy.servicer import PolicyServicer
from steersman.policy.settings import PolicySettings
from steersman.policy.weights.checkpoint import Checkpoint
from steersman.policy.weights.service import WeightServicer
from steersman.policy.weights.store import WeightSource, WeightStore
from steersman.serving.metrics import Metrics
from steersman.serving.service import EngineDead
from steersman.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc
from steersman.wire.errors import unavailable


class PolicyService:
    """One replica: PolicyService and WeightService over one engine."""

    name = "policy"

    def __init__(
        self, engine: GenerationEngine, source: WeightSource, settings: PolicySettings, metrics: Metrics
    ) -> None:
        counted = PolicyMetrics(metrics)
        self._engine = engine
        self.store = WeightStore(engine, source, settings.kv_cache_policy)
        self.handler = GenerationHandler(
            engine,
            counted,
            active_version=lambda: self.store.active.version,
            revision=f"xxh3:{self.store.initial_digest.hex()}",
            max_samples=settings.max_queue_samples,
        )
        counted.watch(lambda: self.handler.num_samples, settings.max_num_seqs)
        self._servicer = PolicyServicer(self.handler)
        self._weight_servicer = WeightServicer(self.store, counted)

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Adds both servicers."""
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self._servicer, server)
        weights_pb2_grpc.add_WeightServiceServicer_to_server(self._weight_servicer, server)
        files: list[Any] = [policy_pb2.DESCRIPTOR, weights_pb2.DESCRIPTOR]
        return [service.full_name for file in files for service in file.services_by_name.values()]

    async def check_health(self) -> None:
        """Raises `EngineDead` when the engine died."""
        try:
            self._engine.check_health()
        except EngineDeadError as error:
            raise EngineDead(str(error)) from error

    async def drain(self) -> None:
        """Nothing: what is in flight may end."""

    async def close(self) -> None:
        """Ends the engine and frees the host copies."""
        try:
            await self.store.close()
        finally:
            await self._engine.shutdown()


async def build(settings: PolicySettings, metrics: Metrics) -> PolicyService:
    """Starts the engine and everything over it. Raises `ValueError` or `SteersmanError` saying what is
    wrong.
    """
    on_cpu = runs_on_cpu()
    options = settings.engine_options(locate(settings.model, settings.revision), on_cpu=on_cpu)
    checkpoint = Checkpoint(options.model)
    prepare_environment(options, on_cpu=on_cpu)
    # Only now: vLLM and torch read the environment when they are imported.
    from steersman.policy.engine.vllm_engine import start_engine

    try:
        engine = start_engine(options)
    except RuntimeError as error:
        raise unavailable(f"the engine did not start: {error}") from error
    try:
        await engine.prepare()
        service = PolicyService(engine, checkpoint, settings, metrics)
    except BaseException:
        await engine.shutdown()
        raise
    # Half a million objects of torch and vLLM live as long as the process: looking through them again and again
    # would hold up the event loop, and the exit.
    gc.collect()
    gc.freeze()
    return service
