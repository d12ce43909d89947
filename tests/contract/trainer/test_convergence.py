"""Whatever breaks when: a replica serves a published version, to the bit, and all serve the last one in the end."""

import random
from contextlib import suppress

import pytest
import torch
from fleet_fakes import fleet, holds, images, service

from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.publication import QuorumNotStaged
from steersman.trainer.weights.settings import ActivationMode
from steersman.v1 import types_pb2
from steersman.wire.errors import Reason, SteersmanError, unavailable

NUM_VERSIONS = 8
FAULTS = {
    "state": [unavailable("away")],
    "begin": [unavailable("away"), SteersmanError(Reason.WEIGHT_BASE_MISMATCH, "another base")],
    "push": [
        unavailable("connection lost"),
        SteersmanError(Reason.WEIGHT_CHUNK_INVALID, "a bit fell over"),
        SteersmanError(Reason.WEIGHT_PUSH_NOT_ACTIVE, "the lease has ended"),
    ],
    "stage": [SteersmanError(Reason.WEIGHT_DIGEST_MISMATCH, "bits fell over"), unavailable("connection lost")],
    "activate": [unavailable("connection lost"), SteersmanError(Reason.WEIGHT_ACTIVATION_FAILED, "no memory")],
}


def break_something(chance: random.Random, services) -> None:
    for one in services:
        if chance.random() < 0.15:
            one.restart()
        for step, errors in FAULTS.items():
            if chance.random() < 0.2:
                one.faults[step] = chance.choices(errors, k=chance.choice([1, 1, 2, 4]))


@pytest.mark.parametrize("mode", list(ActivationMode))
@pytest.mark.parametrize("seed", range(6))
async def test_all_serve_the_last_version_in_the_end(mode: ActivationMode, seed: int) -> None:
    chance = random.Random(seed)
    services = [service("FLOAT32" if seed == 5 else "BFLOAT16"), *(service() for _ in range(3))]
    made = images(NUM_VERSIONS)
    settings = {"activation": mode, "quorum": chance.choice([0.5, 1.0]), "encoding": chance.choice(list(PushEncoding))}
    async with fleet(*services, **settings) as (publisher, replicas):
        targets = [replica.target for replica in replicas]
        for image in made:
            break_something(chance, services)
            await publisher.update_targets(chance.sample(targets, chance.choice([3, 4])))
            with suppress(QuorumNotStaged):
                report = await publisher.publish(image)
                behind = set(report.failures) | (set(targets) - set(publisher.targets))
                for replica in replicas:
                    assert serves_one_of(replica.service, made)
                    assert replica.target in behind or replica.service.active == publisher.wanted
        for one in services:
            one.faults.clear()
        await publisher.update_targets(targets)
        while publisher.wanted != made[-1].version:
            await publisher.publish(made[-1])
        assert (await publisher.reconcile()).failures == {}
    assert all(one.active == made[-1].version and serves_one_of(one, made) for one in services)


def serves_one_of(one, made) -> bool:
    """True if the bits are those of the version that it names; of a restarted one there are none."""
    if not one.active.run_id:
        return True
    image = next(image for image in made if image.version == one.active)
    dtype = torch.float32 if one.manifest.tensors[0].dtype == types_pb2.DATA_TYPE_FLOAT32 else torch.bfloat16
    return holds(one, image, dtype)
