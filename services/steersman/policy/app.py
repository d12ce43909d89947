"""Builds the policy service: checkpoint, engine, weight store, handlers, servicers."""

import asyncio
import gc
from collections.abc import Sequence
from typing import Any, Final

import grpc

from steersman.policy.engine.options import EngineOptions, prepare_environment
from steersman.policy.engine.port import EngineDeadError, GenerationEngine, GenerationRequest
from steersman.policy.handler import GenerationHandler
from steersman.policy.metrics import PolicyMetrics
from steersman.policy.node import NodeService
from steersman.policy.servicer import PolicyServicer
from steersman.policy.settings import PolicySettings
from steersman.policy.weights.checkpoint import Checkpoint
from steersman.policy.weights.relay import Relay, channel_opener
from steersman.policy.weights.service import WeightServicer, add_weight_servicer
from steersman.policy.weights.store import WeightSource, WeightStore
from steersman.serving.location import locate
from steersman.serving.metrics import Metrics
from steersman.serving.service import EngineDead, Service
from steersman.serving.vllm_environment import runs_on_cpu
from steersman.v1 import policy_pb2, policy_pb2_grpc, weights_pb2
from steersman.wire.errors import unavailable

_WARM_UP_S: Final = 600.0
"""Time for the first token. A compiler may run within it; a CPU that swaps does not get there."""


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
        counted.watch(lambda: self.handler.num_samples, lambda: self.handler.num_tokens, settings.max_num_seqs)
        self._servicer = PolicyServicer(self.handler)
        relay = Relay(settings.relay_rules(), channel_opener(settings.relay_credentials))
        self._weight_servicer = WeightServicer(self.store, counted, relay)

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Adds both servicers."""
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self._servicer, server)
        add_weight_servicer(self._weight_servicer, server)
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
            await self._weight_servicer.close()
            await self.store.close()
        finally:
            await self._engine.shutdown()


async def warm_up(engine: GenerationEngine) -> None:
    """Draws one token, so that a model which loads but does not run fails now and not at the first request.

    Raises ENGINE_UNAVAILABLE if the engine dies of it or does not end it.
    """
    request = GenerationRequest(
        request_id="warm-up", prompt_token_ids=[0], max_tokens=1, temperature=0.0, ignore_eos=True, final_only=True
    )
    try:
        async with asyncio.timeout(_WARM_UP_S):
            async for _ in engine.generate(request):
                pass
    except EngineDeadError as error:
        raise unavailable(
            "the engine loaded the model and died of its first token, so it cannot run this model here "
            "(a head size or data type without a kernel?); its own error is in the log above"
        ) from error
    except TimeoutError as error:
        raise unavailable(f"the engine loaded the model, but its first token took over {_WARM_UP_S:g} s") from error


async def build(settings: PolicySettings, metrics: Metrics) -> Service:
    """Starts the engine and everything over it, or the workers of a node that computes for another. Raises
    `ValueError` or `SteersmanError` saying what is wrong.
    """
    on_cpu = runs_on_cpu()
    options = settings.engine_options(locate("model", settings.model, settings.revision), on_cpu=on_cpu)
    prepare_environment(options, on_cpu=on_cpu)
    if options.nodes is not None and options.nodes.rank > 0:
        return _build_node(options)
    return await _build_replica(settings, options, metrics)


def _build_node(options: EngineOptions) -> NodeService:
    from steersman.policy.engine.node import start_node

    try:
        return NodeService(start_node(options))
    except (RuntimeError, OSError) as error:
        raise unavailable(
            f"the workers of node {options.nodes and options.nodes.rank} did not start: {error}"
        ) from error


async def _build_replica(settings: PolicySettings, options: EngineOptions, metrics: Metrics) -> PolicyService:
    checkpoint = Checkpoint(options.model)
    # Only now: vLLM and torch read the environment when they are imported.
    from steersman.policy.engine.vllm_engine import start_engine

    try:
        engine = start_engine(options)
    except RuntimeError as error:
        raise unavailable(f"the engine did not start: {error}") from error
    try:
        await engine.prepare()
        await warm_up(engine)
        service = PolicyService(engine, checkpoint, settings, metrics)
    except BaseException:
        await engine.shutdown()
        raise
    # Half a million objects of torch and vLLM live as long as the process: looking through them again and again
    # would hold up the event loop, and the exit.
    gc.collect()
    gc.freeze()
    return service
