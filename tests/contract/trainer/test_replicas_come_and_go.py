"""Policy replicas that come and go while batches are drawn: discovery, publisher and rollouts together, over gRPC."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_server import ApiServer
from fake_fleet import FakeJudges, FakeReplica, until
from fake_weight_service import FakeWeightService, manifest
from slice_objects import endpoint, endpoint_slice
from torch import nn

from steersman.trainer.discovery.ports import DiscoveryRefused, Targets
from steersman.trainer.retry import GaveUp
from steersman.trainer.rollout.types import Prompt, RolloutBatch
from steersman.trainer.stages import ppo_services
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_services import GrpcServices
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.ports import WeightsRefused
from steersman.wire.errors import unavailable
from steersman.wire.identity import WeightVersion

RUN = "demo.1"


class Fleet:
    """Everything that a run talks to, and the run's side of it."""

    def __init__(self, patch: pytest.MonkeyPatch, judges: FakeJudges, address: str) -> None:
        self.patch = patch
        self.judges = judges
        self.address = address
        self.replicas: list[FakeReplica] = []
        self.discovery: Told | None = None
        self._services: GrpcServices | None = None

    async def replica(self, **options: Any) -> FakeReplica:
        one = FakeReplica(FakeWeightService(manifest({"weight": ((4, 4), "FLOAT32")})), **options)
        await one.start()
        self.replicas.append(one)
        return one

    async def services(self, policies: list[str] | None = None, **settings: Any) -> GrpcServices:
        """The run's side; without `policies` the test tells what discovery finds, by `show`."""
        if policies is None:
            self.discovery = Told()
            self.patch.setattr(ppo_services, "discover", lambda _, default_port: self.discovery)
        config = PpoConfig.model_validate(
            {
                "actor": {"path": "none"},
                "prompts": {"files": ["none"]},
                "max_prompt_tokens": 16,
                "services": {
                    "policies": policies or ["127.0.0.1:1"],
                    "reference": self.address,
                    "reward": self.address,
                    "backoff_seconds": 0.01,
                    "max_backoff_seconds": 0.02,
                    "give_up_seconds": 30.0,
                    **settings,
                },
                "sampling": {"samples_per_prompt": 2, "max_tokens": 8},
            }
        )
        self._services = await asyncio.to_thread(GrpcServices, config, run_id=RUN)
        return self._services

    async def show(self, *replicas: FakeReplica) -> None:
        """Returns once the run has taken it in."""
        assert self.discovery is not None
        targets = tuple(replica.target for replica in replicas)
        self.discovery.news.put_nowait(targets)
        await self.followed(*targets)

    async def followed(self, *targets: str) -> None:
        assert self._services is not None
        async with asyncio.timeout(30):
            while self._services.policy_targets != targets:
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        for replica in self.replicas:
            replica.policy.flowing.set()
        if self._services is not None:
            await asyncio.to_thread(self._services.close)
        for replica in self.replicas:
            await replica.vanish()


class Told:
    """A discovery that finds what it is told."""

    name = "told:///policy"
    problem = ""

    def __init__(self) -> None:
        self.news: asyncio.Queue[Targets] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def targets(self) -> AsyncGenerator[Targets, None]:
        while True:
            # The run has a loop of its own, in another thread.
            yield await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.news.get(), self._loop))


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    judges = FakeJudges()
    server, address = await judges.start()
    made = Fleet(monkeypatch, judges, address)
    try:
        async with asyncio.timeout(90):
            yield made
    finally:
        await made.close()
        await server.stop(None)


def image(step: int) -> WeightImage:
    torch.manual_seed(step)
    return WeightImage.of(nn.Linear(4, 4, bias=False), WeightVersion(run_id=RUN, step=step))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index=index, token_ids=np.array([10 + index, 3], np.int32)) for index in range(count)]


async def published(services: GrpcServices, step: int) -> None:
    report = await asyncio.wrap_future(services.publish(image(step)))
    assert report.failures == {}


def collected(services: GrpcServices, count: int, step: int) -> "asyncio.Future[RolloutBatch]":
    return asyncio.wrap_future(services.collect(prompts(count), oldest_step=step))


def require_whole(batch: RolloutBatch, fleet: Fleet, count: int) -> None:
    """Each sample once, each with the score of what was drawn for it, none drawn by weights too old."""
    assert [rollout.key for rollout in batch.rollouts] == [(index, slot) for index in range(count) for slot in (0, 1)]
    assert batch.drops == ()
    assert batch.num_stale == 0
    drawn = [int(rollout.response_ids[0]) for rollout in batch.rollouts]
    assert len(set(drawn)) == len(drawn)
    assert [rollout.score for rollout in batch.rollouts] == drawn
    assert {token: fleet.judges.scored[token] for token in drawn} == dict.fromkeys(drawn, 1)


async def test_one_vanishes_in_mid_batch_and_another_appears(fleet: Fleet) -> None:
    services = await fleet.services()
    first, second = await fleet.replica(), await fleet.replica()
    await fleet.show(first, second)
    await asyncio.wrap_future(services.check())
    await published(services, 5)
    batch = collected(services, 8, 5)
    # Each prompt has one of its two samples; the rest is held.
    await until(lambda: first.policy.num_prompts + second.policy.num_prompts == 8, [first, second])
    third = await fleet.replica()
    third.policy.flowing.set()
    await fleet.show(first, second, third)
    async with asyncio.timeout(30):
        while not services._collector._pool._replicas[third.target].ready:
            await asyncio.sleep(0.005)
    await first.vanish()
    await fleet.show(second, third)
    await until(lambda: third.policy.num_prompts > 0, [third])
    second.policy.flowing.set()
    whole = await batch
    require_whole(whole, fleet, 8)
    assert whole.num_resent >= 4  # what the first had not finished
    # Weights before prompts, and prompts by these weights only.
    activated = third.weights.events.index(f"activate {RUN}@5")
    asked = [number for number, event in enumerate(third.weights.events) if event.startswith("prompt")]
    assert activated < asked[0]
    assert {third.weights.events[number] for number in asked} == {f"prompt at {RUN}@5"}


async def test_what_a_leaving_replica_has_under_way_may_end_there(fleet: Fleet) -> None:
    services = await fleet.services()
    leaving, staying = await fleet.replica(), await fleet.replica()
    staying.policy.flowing.set()
    await fleet.show(leaving, staying)
    await asyncio.wrap_future(services.check())
    await published(services, 1)
    batch = collected(services, 6, 1)
    await until(lambda: leaving.policy.num_prompts + staying.policy.num_prompts == 6, [leaving, staying])
    # It terminates: not among the targets any more, but it serves what it has.
    await fleet.show(staying)
    num_prompts = leaving.policy.num_prompts
    leaving.policy.flowing.set()
    whole = await batch
    require_whole(whole, fleet, 6)
    assert whole.num_resent == 0
    await published(services, 2)
    require_whole(await collected(services, 6, 2), fleet, 6)
    assert leaving.policy.num_prompts == num_prompts
    assert leaving.weights.active.step == 1


async def test_a_rolling_restart_goes_through_a_run_without_a_loss(fleet: Fleet) -> None:
    services = await fleet.services()
    old = [await fleet.replica(), await fleet.replica()]
    for replica in old:
        replica.policy.flowing.set()
    await fleet.show(*old)
    await asyncio.wrap_future(services.check())
    for step in range(4):
        await published(services, step)
        batch = collected(services, 12, step)
        if step in (1, 2):
            new = await fleet.replica()
            new.policy.flowing.set()
            leaving = old.pop(0)
            old.append(new)
            await fleet.show(*old)
            await leaving.vanish()
        require_whole(await batch, fleet, 12)
    assert [replica.weights.active.step for replica in old] == [3, 3]


async def test_without_any_replica_a_run_waits_and_says_so_and_goes_on_with_the_next(fleet: Fleet) -> None:
    services = await fleet.services()
    first = await fleet.replica()
    await fleet.show(first)
    await asyncio.wrap_future(services.check())
    await published(services, 1)
    batch = collected(services, 2, 1)
    await until(lambda: first.policy.num_prompts == 2, [first])
    await fleet.show()
    await first.vanish()
    async with asyncio.timeout(30):
        while "waiting for a policy replica to appear" not in services.waiting():
            await asyncio.sleep(0.005)
    second = await fleet.replica()
    second.policy.flowing.set()
    await fleet.show(second)
    require_whole(await batch, fleet, 2)
    assert services.waiting() == ""


async def test_patience_without_any_replica_ends(fleet: Fleet) -> None:
    services = await fleet.services(give_up_seconds=0.2)
    with pytest.raises(GaveUp, match="no policy replica appeared for 0 s: told:///policy"):
        await asyncio.wrap_future(services.check())
    first = await fleet.replica()
    await fleet.show(first)
    await asyncio.wrap_future(services.check())
    await published(services, 1)
    await fleet.show()
    with pytest.raises(GaveUp, match=r"no policy replica appeared for .* told:///policy"):
        await collected(services, 2, 1)


async def test_a_batch_waits_for_the_weights_that_were_sent_before_it(fleet: Fleet) -> None:
    services = await fleet.services(activation="all_or_nothing")
    replica = await fleet.replica()
    replica.policy.flowing.set()
    await fleet.show(replica)
    await asyncio.wrap_future(services.check())
    await published(services, 1)
    staging = replica.weights.holds["stage"] = asyncio.Event()
    publishing = asyncio.wrap_future(services.publish(image(2)))
    cancelled, batch = collected(services, 4, 1), collected(services, 4, 2)
    await until(lambda: replica.weights.held_at == "stage", [replica])
    cancelled.cancel()
    await asyncio.wrap_future(services.check())  # time enough for a prompt to get there
    staging.set()
    require_whole(await batch, fleet, 4)
    assert (await publishing).failures == {}
    assert [event for event in replica.weights.events if "prompt" in event] == [f"prompt at {RUN}@2"] * 4


async def test_a_batch_fails_with_the_weights_that_were_sent_before_it(fleet: Fleet) -> None:
    services = await fleet.services(activation="all_or_nothing", give_up_seconds=0.05)
    replica = await fleet.replica()
    await fleet.show(replica)
    await asyncio.wrap_future(services.check())
    replica.weights.faults["begin"] = [unavailable("away")] * 1000
    publishing, batch = asyncio.wrap_future(services.publish(image(1))), collected(services, 2, 1)
    for one in (publishing, batch):
        with pytest.raises(GaveUp, match="a quorum of policies stayed away"):
            await one
    assert replica.policy.num_prompts == 0


async def test_a_new_replica_whose_model_does_not_suit_the_job_ends_the_run_with_the_reason(fleet: Fleet) -> None:
    services = await fleet.services()
    first = await fleet.replica()
    await fleet.show(first)
    await asyncio.wrap_future(services.check())
    await published(services, 1)
    short = await fleet.replica(max_sequence_tokens=20)
    await fleet.show(short)
    with pytest.raises(GaveUp, match=rf"must be at most 20, which the policy at {short.target} accepts"):
        await collected(services, 2, 1)
    assert short.policy.num_prompts == 0


async def test_a_replica_that_refuses_for_good_is_left_out_while_others_go_on(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    services = await fleet.services()
    good, short = await fleet.replica(), await fleet.replica(max_sequence_tokens=20)
    stranger = await fleet.replica()
    stranger.weights.manifest.CopyFrom(manifest({"weight": ((8, 8), "FLOAT32")}))
    for replica in (good, short, stranger):
        replica.policy.flowing.set()
    await fleet.show(good)
    await asyncio.wrap_future(services.check())
    # Of its own accord a stranger shows in a publication, one with too little room at its first prompt.
    assert fleet.discovery is not None
    fleet.discovery.news.put_nowait((good.target, stranger.target))
    await fleet.followed(good.target, stranger.target)
    report = await asyncio.wrap_future(services.publish(image(1)))
    assert "serves another model" in report.failures[stranger.target]
    await fleet.followed(good.target)
    fleet.discovery.news.put_nowait((good.target, short.target, stranger.target))
    require_whole(await collected(services, 6, 1), fleet, 6)
    await fleet.followed(good.target)
    report = await asyncio.wrap_future(services.publish(image(2)))
    assert sorted(report.failures) == sorted([short.target, stranger.target])
    assert (short.policy.num_prompts, stranger.policy.num_prompts) == (0, 0)
    assert f"policy at {stranger.target} is left out, 1 of 2 go on" in caplog.text
    # Another pod under its address is looked at anew.
    await stranger.vanish()
    fleet.discovery.news.put_nowait((good.target,))
    await fleet.followed(good.target)
    stranger.weights.manifest.CopyFrom(good.weights.manifest)
    await stranger.start()
    await fleet.show(good, stranger)
    assert (await asyncio.wrap_future(services.publish(image(3)))).failures == {}
    require_whole(await collected(services, 6, 3), fleet, 6)


async def test_a_job_begins_without_a_replica_that_does_not_suit_it(fleet: Fleet) -> None:
    services = await fleet.services()
    good, short = await fleet.replica(), await fleet.replica(max_sequence_tokens=20)
    await fleet.show(good, short)
    await asyncio.wrap_future(services.check())
    await fleet.followed(good.target)
    # When the others go, it is no better than none; they may come back.
    assert fleet.discovery is not None
    fleet.discovery.news.put_nowait((short.target,))
    await fleet.followed()
    checking = asyncio.wrap_future(services.check())
    async with asyncio.timeout(30):
        while "waiting for a policy replica to appear" not in services.waiting():
            await asyncio.sleep(0.005)
    assert f"left out is {short.target}: max_prompt_tokens + sampling.max_tokens is 24" in services.waiting()
    await fleet.show(good)
    await checking


async def test_a_quorum_is_not_left_out_of(fleet: Fleet) -> None:
    services = await fleet.services(activation="all_or_nothing", activation_quorum=1.0)
    good, stranger = await fleet.replica(), await fleet.replica()
    stranger.weights.manifest.CopyFrom(manifest({"weight": ((8, 8), "FLOAT32")}))
    await fleet.show(good, stranger)
    with pytest.raises(WeightsRefused, match="serves another model"):
        await asyncio.wrap_future(services.publish(image(1)))


async def test_a_service_in_kubernetes_is_scaled_up_and_down(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The API server is a fake that speaks HTTP; everything else is what a run uses."""
    first, second = await fleet.replica(), await fleet.replica()
    first.policy.flowing.set()
    second.policy.flowing.set()

    def pod(name: str, replica: FakeReplica, **conditions: bool) -> dict[str, Any]:
        return endpoint_slice(name, [endpoint("127.0.0.1", **conditions)], ports=[("grpc", replica.port)])

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    with ApiServer() as server:
        (tmp_path / "config").write_text(json.dumps(server.kubeconfig()), encoding="utf-8")
        server.put(pod("a", first))
        services = await fleet.services(["k8s:///policy:grpc"])
        await asyncio.wrap_future(services.check())
        await published(services, 1)
        require_whole(await collected(services, 6, 1), fleet, 6)
        assert (first.policy.num_prompts, second.policy.num_prompts) == (6, 0)
        server.put(pod("b", second))
        await until(lambda: second.weights.active.step == 1, [second])
        server.put(pod("a", first, terminating=True))
        await fleet.followed(second.target)
        await published(services, 2)
        require_whole(await collected(services, 6, 2), fleet, 6)
        assert (first.policy.num_prompts, second.policy.num_prompts) == (6, 6)


async def test_reference_and_reward_are_scaled_too(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each has another endpoint for each batch; what is new gets calls, what is gone gets none."""
    replica = await fleet.replica()
    replica.policy.flowing.set()

    def pod(service: str, name: str, address: str) -> dict[str, Any]:
        ports = [("grpc", int(address.rpartition(":")[2]))]
        return endpoint_slice(name, [endpoint("127.0.0.1")], ports=ports, service=service)

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    with ApiServer() as server:
        (tmp_path / "config").write_text(json.dumps(server.kubeconfig()), encoding="utf-8")
        services = await fleet.services([replica.target], reference="k8s:///reference", reward="k8s:///reward")
        checking = asyncio.wrap_future(services.check())
        async with asyncio.timeout(30):
            while "waiting for reference at k8s:///reference" not in services.waiting():
                await asyncio.sleep(0.005)
        server.put(pod("reference", "first-reference", fleet.address))
        server.put(pod("reward", "first-reward", fleet.address))
        await checking
        await published(services, 1)
        require_whole(await collected(services, 4, 1), fleet, 4)
        others = FakeJudges()
        other_server, other_address = await others.start()
        try:
            batch = collected(services, 4, 1)
            for service in ("reference", "reward"):
                server.put(pod(service, f"second-{service}", other_address))
                server.delete(f"first-{service}")
            await batch
            num_scored = fleet.judges.scored.total()
            async with asyncio.timeout(30):
                while not others.scored:  # once the run has taken it in
                    num_scored = fleet.judges.scored.total()
                    await collected(services, 1, 1)
            await collected(services, 4, 1)
            assert fleet.judges.scored.total() == num_scored
            server.delete("second-reward")
            async with asyncio.timeout(30):
                while services._reward._now is not None:
                    await asyncio.sleep(0.005)
            batch = collected(services, 2, 1)
            async with asyncio.timeout(30):
                while "waiting for reward at k8s:///reward" not in services.waiting():
                    await asyncio.sleep(0.005)
            assert "(k8s:///reward: no EndpointSlices: is there a Service?)" in services.waiting()
            server.put(pod("reward", "first-reward", fleet.address))
            assert len((await batch).rollouts) == 4
        finally:
            await other_server.stop(None)


async def test_a_run_that_finds_no_cluster_says_so(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    services = await fleet.services(["k8s:///policy:grpc"])
    with pytest.raises(DiscoveryRefused, match="no way to the Kubernetes API"):
        await asyncio.wrap_future(services.check())
    with pytest.raises(DiscoveryRefused, match="no way to the Kubernetes API"):
        await collected(services, 2, 1)
