"""TRL's PPOTrainer on given models and prompts; prints one JSON object with the seconds of every batch.

Runs in an environment of its own (see `setup`), and so imports nothing of the project. The trainer has its best
settings for this machine: no gradient checkpointing, no sample generations, no reports, no checkpoints, rollout
and update in as few pieces as fit in memory.
"""

import argparse
import json
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Notes when each batch ends."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())


class Phases:
    """Seconds and response lengths of each rollout, by wrapping TRL's generation. Two clock reads a batch."""

    def __init__(self, eos_token_id: int) -> None:
        self.generation_seconds: list[float] = []
        self.mean_tokens: list[float] = []
        self._eos = eos_token_id
        self._generate = ppo_trainer.batch_generation
        ppo_trainer.batch_generation = self

    def __call__(self, model: Any, queries: torch.Tensor, *arguments: Any) -> Any:
        start = time.perf_counter()
        query_responses, logits = self._generate(model, queries, *arguments)
        self.generation_seconds.append(time.perf_counter() - start)
        ended = (query_responses[:, queries.shape[1] :] == self._eos).int()
        # The end-of-sequence token counts as one of the response.
        before_end = (ended.cumsum(1) == 0).sum(1)
        lengths = torch.clamp(before_end + 1, max=ended.shape[1])
        self.mean_tokens.append(float(lengths.float().mean()))
        return query_responses, logits


def main() -> None:
    """Trains for `--batches` batches."""
    options = _parse()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.policy)
    prompts = [json.loads(line)["prompt"] for line in options.prompts.read_text().splitlines()]
    rows = Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts])
    clock, phases = Clock(), Phases(tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=_config(options, output),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(options.policy, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(options.policy, dtype=torch.float32),
            reward_model=AutoModelForSequenceClassification.from_pretrained(options.reward, dtype=torch.float32),
            value_model=AutoModelForSequenceClassification.from_pretrained(options.reward, dtype=torch.float32),
            train_dataset=rows,
            eval_dataset=rows.select(range(options.batch)),
            callbacks=[clock],
        )
        trainer.train()
    report = {
        "seconds": [after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)],
        "generation_seconds": phases.generation_seconds,
        "mean_response_tokens": phases.mean_tokens,
        "software": {name: metadata.version(name) for name in ("trl", "transformers", "accelerate", "torch")},
    }
    options.report.write_text(json.dumps(report))


def _config(options: argparse.Namespace, output: str) -> PPOConfig:
    return PPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
        local_rollout_forward_batch_size=options.batch,
        total_episodes=options.batches * options.batch,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=options.response_tokens,
        stop_token="eos",
        missing_eos_penalty=options.missing_eos_penalty,
        temperature=1.0,
        learning_rate=options.learning_rate,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=options.seed,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("policy", "reward", "prompts", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("batches", "batch", "micro-batch", "response-tokens", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--missing-eos-penalty", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
