"""A run whose settings ask for a quorum waits for it, as for any service that is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from fake_fleet import FakeReplica
from fake_weight_service import FakeWeightService, manifest
from torch import nn

from steersman.trainer.retry import GaveUp
from steersman.trainer.stages.ppo_config import PpoConfig, ServiceSettings
from steersman.trainer.stages.ppo_services import GrpcServices
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.wire.errors import unavailable
from steersman.wire.identity import WeightVersion

RUN = "demo.1"


def image(step: int) -> WeightImage:
    torch.manual_seed(step)
    return WeightImage.of(nn.Linear(4, 4, bias=False), WeightVersion(run_id=RUN, step=step))


@asynccontextmanager
async def run_of(num_replicas: int, **settings: Any) -> AsyncIterator[tuple[GrpcServices, list[FakeWeightService]]]:
    weights = [FakeWeightService(manifest({"weight": ((4, 4), "FLOAT32")})) for _ in range(num_replicas)]
    replicas = [FakeReplica(one) for one in weights]
    for replica in replicas:
        await replica.start()
    config = PpoConfig.model_validate(
        {
            "actor": {"path": "none"},
            "prompts": {"files": ["none"]},
            "services": {
                "policies": [replica.target for replica in replicas],
                "backoff_seconds": 0.01,
                "max_backoff_seconds": 0.02,
                **settings,
            },
        }
    )
    services = await asyncio.to_thread(GrpcServices, config, run_id=RUN)
    try:
        async with asyncio.timeout(60):
            while len(services.policy_targets) < num_replicas:
                await asyncio.sleep(0)
            yield services, weights
    finally:
        await asyncio.to_thread(services.close)
        for replica in replicas:
            await replica.vanish()


async def test_the_same_weights_are_published_until_a_quorum_takes_them() -> None:
    async with run_of(2, activation="all_or_nothing") as (services, [away, present]):
        # Three tries make a publication; two are given up.
        away.faults["begin"] = [unavailable("away")] * 6
        report = await asyncio.wrap_future(services.publish(image(0)))
    assert report.failures == {}
    assert "abort" in present.events
    for one in (away, present):
        assert [event for event in one.events if event.startswith("activate")] == [f"activate {RUN}@0"]
        assert one.active == WeightVersion(run_id=RUN, step=0)


async def test_a_run_gives_up_when_no_quorum_comes() -> None:
    async with run_of(2, activation="all_or_nothing", give_up_seconds=0.05) as (services, [away, present]):
        away.faults["begin"] = [unavailable("away")] * 1000
        with pytest.raises(GaveUp, match="a quorum of policies stayed away for .* staged by"):
            await asyncio.wrap_future(services.publish(image(0)))
    assert present.active == away.active == WeightVersion()


async def test_as_staged_needs_no_quorum() -> None:
    async with run_of(2) as (services, [away, present]):
        away.faults["begin"] = [unavailable("away")] * 3
        report = await asyncio.wrap_future(services.publish(image(0)))
    assert len(report.failures) == 1
    assert present.active == WeightVersion(run_id=RUN, step=0)


@pytest.mark.parametrize(
    "settings",
    [{"activation_quorum": 0}, {"activation_quorum": 1.5}, {"activation": "some"}, {"stage_timeout_seconds": 0}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ServiceSettings.model_validate(settings)


async def test_the_settings_of_a_job_are_those_of_its_publications() -> None:
    async with run_of(
        1,
        activation="all_or_nothing",
        activation_quorum=0.5,
        stage_timeout_seconds=7.0,
        push_encoding="compact",
        delta_history_mib=3,
    ) as (services, _):
        assert services._publisher._settings == PublishSettings(
            activation=ActivationMode.ALL_OR_NOTHING,
            quorum=0.5,
            stage_timeout_seconds=7.0,
            encoding=PushEncoding.COMPACT,
            delta_history_bytes=3 * 2**20,
        )
