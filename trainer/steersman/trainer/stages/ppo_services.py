"""The network side of PPO, on an event loop in a thread of its own.

The main thread computes; it hands over prompts and weights, and gets futures. Nothing that takes long ever runs on
the loop, and no torch computation of the update runs beside the main thread.
"""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

from transformers import PreTrainedTokenizerBase

from steersman.client import (
    AsyncPolicyClient,
    AsyncReferenceClient,
    AsyncRewardClient,
    AsyncWeightClient,
    ChannelSettings,
    Overlength,
)
from steersman.trainer.discovery.ports import Discovery
from steersman.trainer.discovery.union import discover
from steersman.trainer.retry import Backoff, Waits, retry
from steersman.trainer.rollout.adapters import GrpcPolicy, GrpcReward
from steersman.trainer.rollout.collector import Collector, CollectorSettings
from steersman.trainer.rollout.types import Prompt, RolloutBatch, SamplingSettings
from steersman.trainer.stages.credentials import read_credentials
from steersman.trainer.stages.ppo_config import PpoConfig, ServiceSettings
from steersman.trainer.stages.ppo_replicas import PolicyReplicas
from steersman.trainer.stages.ppo_scorers import FollowedClient, FollowedReference, FollowedReward
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.image import Image
from steersman.trainer.weights.ports import Connect, LeaveOut
from steersman.trainer.weights.publication import QuorumNotStaged
from steersman.trainer.weights.publisher import Publisher
from steersman.trainer.weights.relay import RelayDelivery, RelaySettings
from steersman.trainer.weights.report import PublishReport
from steersman.trainer.weights.routes import Topology
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.wire.errors import SteersmanError
from steersman.wire.identity import ModelInfo

T = TypeVar("T")

# Where the services listen unless told otherwise; DNS names hosts, not ports.
_POLICY_PORT: Final = 50051
_REFERENCE_PORT: Final = 50052
_REWARD_PORT: Final = 50053


class Services(Protocol):
    """What the PPO loop asks of the network. Tests stand in for it."""

    def collect(self, prompts: Sequence[Prompt], *, oldest_step: int, priority: int = 0) -> "Future[RolloutBatch]":
        """Starts a batch, every token of it to be drawn by weights of `oldest_step` or later. Of several batches the
        one with the lowest `priority` goes first. Its prompts are sent when the publication that began before it, if
        any, has ended; it fails with that. Cancelling the future ends it.
        """
        ...

    def publish(self, image: Image) -> "Future[PublishReport]":
        """Starts to push weights to every replica."""
        ...

    def waiting(self) -> str:
        """What is being waited for, for the progress line; empty if nothing is away."""
        ...

    def close(self) -> None:
        """Ends everything under way."""
        ...


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="steersman-network", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Runs `work` on the loop. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Cancels what still runs and ends the thread."""
        if self._thread.is_alive():
            self.start(_cancel_others()).result(timeout_seconds)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout_seconds)
        self._loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class GrpcServices:
    """`Services` over gRPC. Use as a context manager."""

    def __init__(self, config: PpoConfig, *, run_id: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._config = config
        self._run_id = run_id
        self._tokenizer = tokenizer
        self._credentials = read_credentials(config.services.credentials)
        self._waits = Waits()
        settings = config.services
        self._backoff = Backoff(
            initial_seconds=settings.backoff_seconds,
            max_seconds=settings.max_backoff_seconds,
            give_up_seconds=settings.give_up_seconds,
        )
        self._channel = _channel_settings(settings)
        # No retries inside the channel: what comes back must get its weights before a prompt reaches it.
        self._once = replace(self._channel, retry_attempts=1)
        self._thread = LoopThread()
        self._stack = AsyncExitStack()
        self._publishing: Future[PublishReport] | None = None
        self._discovery: Discovery = discover(settings.policies, default_port=_POLICY_PORT)
        self._publisher: Publisher
        self._replicas: PolicyReplicas
        self._collector: Collector
        try:
            self._thread.start(self._open()).result()
        except BaseException:
            self._thread.close()
            raise

    def check(self) -> "Future[None]":
        """Asks the services for their models, waiting for the reference and for at least one policy replica.

        ValueError if one cannot hold the sequences of the job, or numbers its tokens otherwise.
        """
        return self._thread.start(self._check())

    def collect(self, prompts: Sequence[Prompt], *, oldest_step: int, priority: int = 0) -> "Future[RolloutBatch]":
        """Starts a batch, when the weights whose publication began before are out."""
        return self._thread.start(self._collect(prompts, oldest_step, priority, after=self._publishing))

    def publish(self, image: Image) -> "Future[PublishReport]":
        """Starts to push weights to every replica."""
        self._publishing = self._thread.start(self._publish(image))
        return self._publishing

    def waiting(self) -> str:
        """What is being waited for."""
        text = self._waits.text()
        problems = "; ".join(filter(None, (one.problem for one in (self._replicas, self._reference, self._reward))))
        return f"{text} ({problems})" if text and problems else text

    @property
    def policy_targets(self) -> tuple[str, ...]:
        """The policy replicas now."""
        return self._replicas.targets

    def close(self) -> None:
        """Ends everything under way and closes the channels."""
        try:
            self._thread.start(self._close()).result(10.0)
        finally:
            self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _open(self) -> None:
        config, settings = self._config, self._config.services
        secret, channel, once = self._credentials, self._channel, self._once
        self._reference = FollowedClient(
            settings.reference,
            lambda target: AsyncReferenceClient(target, credentials=secret, settings=channel),
            default_port=_REFERENCE_PORT,
        )
        self._stack.push_async_callback(self._reference.close)
        self._reward = FollowedClient(
            settings.reward,
            lambda target: AsyncRewardClient(target, credentials=secret, settings=channel),
            default_port=_REWARD_PORT,
        )
        self._stack.push_async_callback(self._reward.close)

        def publish_to(leave_out: LeaveOut) -> Publisher:
            return Publisher(
                weight_connections(settings),
                run_id=self._run_id,
                backoff=self._backoff,
                waits=self._waits,
                settings=_publish_settings(settings),
                delivery=RelayDelivery(
                    RelaySettings(topology=Topology(settings.push_topology), fan_out=settings.push_fan_out)
                ),
                leave_out=leave_out,
            )

        self._replicas = PolicyReplicas(
            self._discovery,
            publish_to,
            self._check_policy,
            min_share=settings.activation_quorum if settings.activation == "all_or_nothing" else 0.0,
            backoff=self._backoff,
            waits=self._waits,
        )
        self._publisher = self._replicas.publisher
        self._collector = Collector(
            lambda target: GrpcPolicy(client=AsyncPolicyClient(target, credentials=secret, settings=once)),
            self._reward_port(),
            FollowedReference(followed=self._reference),
            self._replicas,
            settings=CollectorSettings(
                sampling=SamplingSettings(
                    num_samples=config.sampling.samples_per_prompt,
                    temperature=config.sampling.temperature,
                    max_tokens=config.sampling.max_tokens,
                    min_tokens=config.sampling.min_tokens,
                    ignore_eos=config.sampling.ignore_eos,
                ),
                backoff=self._backoff,
                max_in_flight=settings.max_in_flight,
                call_items=settings.call_items,
                call_concurrency=settings.call_concurrency,
                item_attempts=settings.item_attempts,
            ),
            waits=self._waits,
            explain_absence=self._replicas.explain_absence,
        )
        self._replicas.follow(self._collector.update_targets)

    async def _collect(
        self, prompts: Sequence[Prompt], oldest_step: int, priority: int, *, after: "Future[PublishReport] | None"
    ) -> RolloutBatch:
        if after is not None:
            sent = asyncio.wrap_future(after)
            sent.add_done_callback(lambda sent: sent.cancelled() or sent.exception())  # the publisher is told of it too
            await asyncio.wait([sent])  # which leaves it alone when this batch is cancelled
            sent.result()
        self._replicas.require_following()
        return await self._collector.collect(prompts, oldest_step=oldest_step, priority=priority)

    def _reward_port(self) -> FollowedReward:
        settings, tokenizer = self._config.services, self._tokenizer
        if settings.reward_input == "text" and tokenizer is None:
            raise ValueError("services.reward_input is text, which needs a tokenizer")

        def port(client: AsyncRewardClient) -> GrpcReward:
            overlength = Overlength.TRUNCATE_PROMPT if settings.truncate_prompt else Overlength.FAIL
            if settings.reward_input == "tokens" or tokenizer is None:
                return GrpcReward(client=client, scorer=settings.scorer, overlength=overlength)
            return GrpcReward(
                client=client,
                scorer=settings.scorer,
                overlength=overlength,
                decode_prompt=lambda ids: str(tokenizer.decode(ids.tolist())),
                decode_response=lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)),
            )

        return FollowedReward(followed=self._reward, port=port)

    async def _publish(self, image: Image) -> PublishReport:
        """Waits for a quorum, where one is asked for, as for any service that is away. GaveUp at the end."""

        async def publish() -> PublishReport:
            report = await self._publisher.publish(image)
            return replace(report, failures=self._replicas.left_out | dict(report.failures))

        def is_short_of_replicas(error: SteersmanError) -> bool:
            return isinstance(error, QuorumNotStaged)

        what = "a quorum of policies"
        return await retry(publish, what=what, backoff=self._backoff, waits=self._waits, retryable=is_short_of_replicas)

    async def _check(self) -> None:
        await asyncio.gather(self._replicas.any_fit(), self._check_reference())

    async def _check_reference(self) -> None:
        what = f"reference at {self._reference.target}"

        async def ask() -> ModelInfo:
            async with self._reference.lease() as client:
                return await _ask(client)

        model = await retry(ask, what=what, backoff=self._backoff, waits=self._waits)
        self._require_room(model, what)

    async def _check_policy(self, target: str) -> None:
        async with AsyncPolicyClient(target, credentials=self._credentials, settings=self._once) as client:
            self._require_room(await _ask(client), f"policy at {target}")

    def _require_room(self, model: ModelInfo, name: str) -> None:
        longest = self._config.max_prompt_tokens + self._config.sampling.max_tokens
        if 0 < model.max_sequence_tokens < longest:
            raise ValueError(
                f"max_prompt_tokens + sampling.max_tokens is {longest}, must be at most {model.max_sequence_tokens}, "
                f"which the {name} accepts"
            )

    async def _close(self) -> None:
        await self._replicas.close()
        await self._collector.close()
        await self._publisher.close()
        await self._stack.aclose()


def weight_connections(settings: ServiceSettings) -> Connect:
    """How whoever pushes weights, the lead or another rank, gets to a replica."""
    secret = read_credentials(settings.credentials)
    once = replace(_channel_settings(settings), retry_attempts=1)
    return lambda target: AsyncWeightClient(
        target, credentials=secret, settings=once, timeout=_weight_call_seconds(settings)
    )


async def _ask(client: AsyncPolicyClient | AsyncReferenceClient) -> ModelInfo:
    return await client.model(timeout=10.0)


def _publish_settings(settings: ServiceSettings) -> PublishSettings:
    return PublishSettings(
        activation=ActivationMode(settings.activation),
        quorum=settings.activation_quorum,
        stage_timeout_seconds=settings.stage_timeout_seconds,
        encoding=PushEncoding(settings.push_encoding),
        delta_history_bytes=settings.delta_history_mib * 2**20,
    )


def _channel_settings(settings: ServiceSettings) -> ChannelSettings:
    seconds = settings.keepalive_seconds
    return ChannelSettings(keepalive_seconds=seconds, keepalive_timeout_seconds=seconds / 2)


def _weight_call_seconds(settings: ServiceSettings) -> float:
    # What a step may wait for must not be cut off before; and what is late goes on for as long as it usually may.
    return max(settings.stage_timeout_seconds, AsyncWeightClient.default_timeout)
