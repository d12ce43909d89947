"""PPO on several ranks: the lead runs the loop, the others do what it does to the models.

The lead alone draws rollouts, publishes weights and writes the run folder, exactly as a single process does; only that
every rank sends its own shards to the replicas, when the lead's publisher has it do so. Whatever the lead asks of its
learner, it first has the others ask of theirs; rollouts reach them with it. Between two commands they wait for as
long as the lead waits for services.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from steersman.trainer.checkpoint.state import load_state
from steersman.trainer.distributed.world import World
from steersman.trainer.rollout.packing import pack, unpack
from steersman.trainer.rollout.types import Rollout
from steersman.trainer.stages.ppo_learner import PpoLearner
from steersman.trainer.weights.image import Image
from steersman.trainer.weights.sharded import ShardedWeights, shards_of
from steersman.wire.identity import WeightVersion


class LeadLearner:
    """The lead's `Learner`: everything is done on all ranks. `close` it after the publisher, or the others wait on."""

    def __init__(self, learner: PpoLearner, world: World, weights: ShardedWeights) -> None:
        self._learner = learner
        self._world = world
        self._weights = weights

    def update(self, rollouts: Sequence[Rollout], *, step: int, kl_coef: float) -> dict[str, float]:
        """Trains on one batch, of which each rank computes its share."""
        self._world.tell("update", step=step, kl_coef=kl_coef)
        self._world.from_lead(pack(rollouts))
        return self._learner.update(rollouts, step=step, kl_coef=kl_coef)

    def state_dict(self) -> dict[str, Any]:
        """What the trainer state keeps of the optimizers."""
        return self._learner.state_dict()

    def write(self, directory: Path) -> None:
        """Every rank writes its part."""
        self._world.tell("write", directory=str(directory))
        self._learner.write(directory)

    def read(self, directory: Path, state: dict[str, Any]) -> None:
        """Every rank reads its part."""
        self._world.tell("read", directory=str(directory))
        self._learner.read(directory, state)

    def image(self, version: WeightVersion) -> Image | None:
        """The actor's weights, to be published; each rank holds its part."""
        self._world.tell("image", run_id=version.run_id, step=version.step)
        return self._weights.capture(shards_of(self._learner.actor), version)

    def whole_actor(self) -> PreTrainedModel | None:
        """The actor with all its weights."""
        self._world.tell("whole_actor")
        return self._learner.whole_actor()

    def close(self) -> None:
        """Lets the others go."""
        with suppress(RuntimeError):  # the store is gone where torchrun has begun to end all
            self._world.tell("end")
        self._weights.close()


def follow(learner: PpoLearner, world: World, weights: ShardedWeights, *, stop_requested: Callable[[], bool]) -> int:
    """Does what the lead says, until it says that it is done; gives how many updates that were. One that is told to
    stop tells the lead, and goes on: the lead's checkpoint needs every rank.
    """
    num_updates = 0
    while True:
        command = world.hear(each_look=lambda: world.ask_to_stop() if stop_requested() else None)
        arguments = command.arguments
        match command.name:
            case "update":
                learner.update(unpack(world.from_lead(None)), step=arguments["step"], kl_coef=arguments["kl_coef"])
                num_updates += 1
            case "write":
                learner.write(Path(arguments["directory"]))
            case "read":
                directory = Path(arguments["directory"])
                learner.read(directory, load_state(directory)["learner"])
            case "image":
                version = WeightVersion(run_id=arguments["run_id"], step=arguments["step"])
                weights.capture(shards_of(learner.actor), version)
            case "whole_actor":
                learner.whole_actor()
            case "end":
                return num_updates
            case _:
                raise RuntimeError(f"the lead gave the unknown command {command.name!r}: ranks run different versions")
