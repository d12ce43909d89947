"""Stages on two ranks give the numbers of one process, and go on from each other's checkpoints."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from stages_program import run_plan, run_stage
from tiny_model import MODEL, VOCABULARY, write_tokenizer
from torchrun import ended, torchrun
from transformers import GenerationConfig

from steersman.trainer.checkpoint.models import load_actor
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.distributed.world import SOLO
from steersman.trainer.stages.run import read_rows

# On a busy machine each rank takes a minute to start.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAM = str(Path(__file__).with_name("stages_program.py"))
STEPS = 6
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def words(chance: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{chance.randrange(3, 31)}" for _ in range(chance.randint(low, high)))


def supervised(folder: Path, rows: list[dict[str, str]], name: str) -> dict[str, Any]:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"config": MODEL},
        "tokenizer": write_tokenizer(folder / "tokenizer"),
        "data": {"files": [str(data)]},
        "eval_share": 0.25,
        "max_prompt_tokens": 8,
        "max_response_tokens": 10,
        "batch_size": 7,
        "micro_batch_tokens": 50,
        "max_steps": STEPS,
        "optimizer": {"learning_rate": 5e-3},
        "log_every_steps": 1,
        "save_every_steps": 0,
        "device": "cpu",
    }


def plan(folder: Path) -> list[dict[str, Any]]:
    chance = random.Random(3)
    told = [{"prompt": words(chance, 1, 6), "completion": words(chance, 1, 8)} for _ in range(40)]
    compared = [
        {"prompt": words(chance, 1, 4), "chosen": words(chance, 1, 8), "rejected": words(chance, 1, 8)}
        for _ in range(40)
    ]
    sft, pairs = supervised(folder, told, "told"), supervised(folder, compared, "compared")
    return [
        {"name": "sft", "kind": "sft", "config": sft},
        {"name": "stopped", "kind": "sft", "config": sft, "stop_after": 3},
        {"name": "reward_model", "kind": "reward_model", "config": pairs},
        {"name": "kept", "kind": "updates", "config": {"micro_batch_tokens": 20, "exact_entropy": True}},
        {
            "name": "partly_kept",
            "kind": "updates",
            "config": {"micro_batch_tokens": 16, "retained_tokens": 20, "critic_warmup_steps": 1},
        },
        # Untied embeddings, biases, a block of another name.
        {"name": "gpt2", "kind": "updates", "config": {"actor": {"config": GPT2}}},
        {
            "name": "minibatches",
            "kind": "updates",
            "config": {
                "num_epochs": 2,
                "num_minibatches": 3,
                "kl": {"place": "loss"},
                "entropy_coefficient": 0.01,
                "whiten_rewards": True,
            },
        },
    ]


def from_files(folder: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The supervised stages, from an actor in several files that lacks the heads, and in another type."""
    actor = load_actor(ModelSource(config=MODEL), seed=11)
    actor.bfloat16().save_pretrained(folder / "actor", max_shard_size="2KB")
    assert (folder / "actor" / "model.safetensors.index.json").exists()
    GenerationConfig(top_k=7, do_sample=True).save_pretrained(folder / "actor")
    made = []
    for name, changes in (("sft", {}), ("reward_model", {"tokenizer": write_tokenizer(folder / "unpadded", pad=None)})):
        entry = next(entry for entry in entries if entry["name"] == name)
        config = entry["config"] | changes | {"model": {"path": str(folder / "actor")}, "max_steps": 2}
        made.append(entry | {"name": f"{name}_from_files", "config": config})
    return made


def write_larger_model(folder: Path) -> tuple[int, int]:
    """A model of which no tensor is a large part; its bytes in float32, and those of its largest tensor."""
    model = load_actor(
        ModelSource(config=MODEL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}), seed=9
    )
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    model.bfloat16().save_pretrained(folder, max_shard_size="100KB")
    return sum(sizes), max(sizes)


def rows_of(directory: Path) -> list[dict[str, float]]:
    rows = read_rows(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time")} for row in rows]


def require_alike(directory: Path, other: Path) -> None:
    ours, theirs = rows_of(directory), rows_of(other)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)


async def test_two_ranks_give_the_numbers_of_one_process_and_go_on_from_its_checkpoints(tmp_path: Path) -> None:
    entries = plan(tmp_path)
    entries += from_files(tmp_path, entries)
    (tmp_path / "plan.json").write_text(json.dumps(entries))
    run_plan(tmp_path, "one", SOLO)
    # What one process has begun, ranks go on with.
    sft = entries[0]
    run_stage(tmp_path / "taken_over" / "ranks", sft, SOLO, stop_after=2)
    loading = {"name": "loading", "kind": "loading", "path": str(tmp_path / "larger")}
    num_bytes, largest = write_larger_model(tmp_path / "larger")
    (tmp_path / "plan.json").write_text(json.dumps([*entries, sft | {"name": "taken_over"}, loading]))

    log = tmp_path / "log.txt"
    async with torchrun(2, log, PROGRAM, str(tmp_path)) as process:
        assert await ended(process) == 0, log.read_text()

    for entry in entries:
        require_alike(tmp_path / entry["name"] / "ranks", tmp_path / entry["name"] / "one")
    require_alike(tmp_path / "taken_over" / "ranks", tmp_path / "sft" / "one")
    assert [row["step"] for row in rows_of(tmp_path / "stopped" / "ranks")] == [1, 2, 3]
    # What ranks have begun, one process goes on with.
    run_stage(tmp_path / "stopped" / "ranks", sft, SOLO)
    require_alike(tmp_path / "stopped" / "ranks", tmp_path / "sft" / "one")

    seen = [json.loads((tmp_path / "loading" / "ranks" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for model in ("actor", "critic"):
        assert seen[0][f"{model}/parts"] == seen[0][f"{model}/whole"]
        for of_rank in seen:
            assert of_rank[f"{model}/whole/bytes"] > num_bytes
            assert of_rank[f"{model}/parts/bytes"] < num_bytes / 2 + 2 * largest

    for name in ("sft", "reward_model", "sft_from_files", "reward_model_from_files"):
        ours, theirs = (tmp_path / name / which / "model" for which in ("ranks", "one"))
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        for settings in (ours / "config.json", *ours.glob("generation_config.json")):
            assert json.loads(settings.read_text()) == json.loads((theirs / settings.name).read_text())
    ours, theirs = (
        load_actor(ModelSource(path=str(tmp_path / "sft" / which / "model"))).state_dict() for which in ("ranks", "one")
    )
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
