"""Runs what FOLDER/plan.json lists, on the ranks that torchrun started or alone: stages, and updates of PPO."""

import itertools
import json
import os
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_model import MODEL, VOCABULARY
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from steersman.trainer.checkpoint.models import load_actor, load_scalar_head, open_actor, open_scalar_head
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.distributed.world import World, launched_size
from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import STAGES
from steersman.trainer.rollout.types import FinishReason, Prompt, Rollout, VersionSpan, WeightVersion
from steersman.trainer.stages.placement import place
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_learner import PpoLearner
from steersman.trainer.stages.run import Run
from steersman.trainer.stages.trained import Trained

UPDATES = 2


def run_plan(folder: Path, directories: str, world: World) -> None:
    """Each entry of the plan, into the directory of this name below that of the entry."""
    for entry in json.loads((folder / "plan.json").read_text()):
        directory = folder / entry["name"] / directories
        if entry["kind"] == "updates":
            run_updates(directory, entry["config"], world)
        elif entry["kind"] == "loading":
            run_loading(directory, entry["path"], world)
        else:
            run_stage(directory, entry, world, stop_after=entry.get("stop_after"))


def run_stage(directory: Path, entry: dict[str, Any], world: World, *, stop_after: int | None = None) -> None:
    """A stage to its end, or until the last rank alone is told to stop."""
    stage = STAGES[JobKind(entry["kind"])]
    config = stage.load_config_class().model_validate(entry["config"])
    is_told = world.rank == world.size - 1 and stop_after is not None
    with Run(
        directory, run_id="test", stop_requested=after(stop_after) if is_told else lambda: False, world=world
    ) as run:
        stage.load_run()(config, run)


def after(num_steps: int | None) -> Callable[[], bool]:
    """Asked once a step: true from the step after `num_steps` on."""
    asked = itertools.count()
    return lambda: num_steps is not None and next(asked) >= num_steps


def run_updates(directory: Path, changes: dict[str, Any], world: World) -> None:
    """Some updates of actor and critic, from rollouts that are the same every time."""
    settings = {"actor": {"config": MODEL}, "tokenizer": "unused", "prompts": {"files": ["unused"]}, "device": "cpu"}
    # Biases of keys have no gradient but rounding, which a smaller epsilon would make an update of.
    rate = {"learning_rate": 3e-3, "schedule": "constant", "max_grad_norm": 0.5, "epsilon": 1e-5}
    config = PpoConfig.model_validate(settings | {"optimizer": rate, "critic_optimizer": rate} | changes)
    placement = place("cpu", "float32")
    actor, critic = load_actor(config.actor), load_scalar_head(config.actor)
    learner = PpoLearner(
        actor,
        critic,
        config,
        world=world,
        actor_scope=placement.settle(actor, world),
        critic_scope=placement.settle(critic, world),
    )
    for model in (actor, critic):
        held = sum(world.local(parameter).numel() for parameter in model.parameters())
        share = held / sum(parameter.numel() for parameter in model.parameters())
        assert abs(share - 1 / world.size) < 0.05, f"rank {world.rank} holds {share} of a model"
    rows = [learner.update(rollouts(step), step=step, kl_coef=0.1) for step in range(UPDATES)]
    whole = learner.whole_actor()
    if whole is not None:
        directory.mkdir(parents=True)
        rows.append({name: float(p.detach().double().sum()) for name, p in whole.named_parameters()})
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_loading(directory: Path, path: str, world: World) -> None:
    """Loads the models of files whole and in parts; writes what they are, and the most bytes that this rank held."""
    source, placement = ModelSource(path=path), place("cpu", "float32")
    seen: dict[str, Any] = {}
    for which, load in (("actor", open_actor), ("critic", open_scalar_head)):
        for in_parts in (False, True):
            with Held() as held:
                opened = load(source, seed=5, in_parts=in_parts)
                assert (opened.files is not None) == in_parts
                placement.settle(opened.model, world, opened.files)
            trained = Trained(world=world, models={"": opened.model}, optimizers={})
            whole = trained.whole("")
            if whole is not None:
                numbers = {name: float(t.double().abs().sum()) for name, t in whole.state_dict().items()}
                buffers = {name: float(t.double().sum()) for name, t in opened.model.named_buffers()}
                seen[f"{which}/{'parts' if in_parts else 'whole'}"] = numbers | buffers
            seen[f"{which}/{'parts' if in_parts else 'whole'}/bytes"] = held.most
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"rank-{world.rank}.json").write_text(json.dumps(seen))


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._numbers = itertools.count()
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, made)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        # A mapped file is no memory of this process.
        if local.is_meta or storage in self._known or storage.filename is not None:
            return
        number = next(self._numbers)
        self._known[storage] = number
        self._sizes[number] = storage.nbytes()
        weakref.finalize(storage, self._sizes.pop, number)
        self.most = max(self.most, sum(self._sizes.values()))


def rollouts(seed: int, count: int = 5) -> list[Rollout]:
    """Of different lengths."""
    generator = np.random.default_rng(seed)
    version = WeightVersion(run_id="demo.1", step=0)
    made = []
    for index in range(count):
        length = int(generator.integers(1, 12))
        made.append(
            Rollout(
                prompt=Prompt(
                    index=index,
                    token_ids=generator.integers(3, VOCABULARY, generator.integers(1, 6)).astype(np.int32),
                ),
                sample=0,
                response_ids=generator.integers(3, VOCABULARY, length).astype(np.int32),
                behaviour_logprobs=generator.normal(-3.4, 0.3, length).astype(np.float32),
                ref_logprobs=generator.normal(-3.4, 0.3, length).astype(np.float32),
                weight_versions=(VersionSpan(version=version, start=0, end=length),),
                score=float(generator.normal()),
                finish_reason=FinishReason.STOP if index % 2 else FinishReason.LENGTH,
            )
        )
    return made


def forbid_pickle() -> None:
    """Whatever would pickle, between ranks or to disk, fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something is pickled")

    distributed_c10d._pickler = distributed_c10d._unpickler = refuse  # type: ignore[misc, assignment]
    torch.save = torch.load = pickle.dump = pickle.dumps = pickle.load = pickle.loads = refuse  # type: ignore[assignment]


def main(folder: Path) -> None:
    """On the ranks of torchrun."""
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else threads load models, where nobody counts
    forbid_pickle()
    assert launched_size() > 1
    from steersman.trainer.distributed.ranks import Ranks

    with Ranks() as world:
        run_plan(folder, "ranks", world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
