"""The order of things.

    data -> sft -> policy (vLLM), reference -> pairs, compared -> reward_model -> reward -> ppo -> evaluation

Services are processes that talk gRPC; training runs as jobs of the trainer service. This is a client of them: it uses
the SDK and the supervisor, and nothing of the trainer or the services.
"""

import asyncio
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.demo import annotator
from examples.steps.config import LanguageSource, PipelineConfig, merged
from examples.steps.console import Console
from examples.steps.generation import Answer, Tokenizer, answer_all, divergences
from examples.steps.probe import Probe
from examples.steps.sources import Prepared, prepare, write_rows
from examples.steps.stack import Stack
from examples.steps.statistics import Estimate, mean, win_rate
from steersman.client import AsyncRewardClient, JobKind, ScoreItem


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Answers to the held-out prompts under one policy."""

    answers: Sequence[Answer]
    gold: Sequence[float] | None


class Pipeline:
    """One run of the pipeline in a folder of its own."""

    def __init__(self, config: PipelineConfig, directory: Path, console: Console, stack: Stack) -> None:
        self._config = config
        self._directory = directory
        self._console = console
        self._stack = stack
        self._figures: dict[str, Any] = {}

    def run(self) -> None:
        """All of it; the results are in summary.json and evaluation.jsonl."""
        config, console, stack = self._config, self._console, self._stack
        with console.phase("data"):
            data = prepare(config, self._directory / "data")
            tokenizer = Tokenizer(data.tokenizer, max_prompt_tokens=config.max_prompt_tokens)
            console.say(f"{len(data.train_prompts)} prompts to train on, {len(data.held_out_prompts)} held out")
            stack.start("trainer", settings={"trainer": {"runs_directory": self._directory / "jobs"}})
        with console.phase("sft"):
            sft = self._train_sft(data)
        with console.phase("serving"):
            # The answers before come from the same process as those after: only the weights differ.
            self._serve(policy=sft, reference=sft)
            before = self._measure(data, tokenizer, "before PPO")
        with console.phase("comparisons"):
            comparisons = data.comparisons or self._compare(data, tokenizer)
        with console.phase("reward_model"):
            reward_model = self._train_reward_model(sft, comparisons)
        with console.phase("scoring"):
            self._serve(reward=reward_model)
        with console.phase("ppo"):
            self._train_ppo(data, sft, reward_model, tokenizer)
        with console.phase("evaluation"):
            after = self._measure(data, tokenizer, "after PPO")
            self._evaluate(before, after)
        self._write_summary()

    def _serve(self, **models: Path) -> None:
        settings = {name: {"model": path} | self._config.services.get(name, {}) for name, path in models.items()}  # type: ignore[call-overload]
        self._stack.start(*models, settings=settings)

    def _train_sft(self, data: Prepared) -> Path:
        config = self._config
        known = self._lengths() | {
            "model": {"config": config.model},
            "tokenizer": str(data.tokenizer),
            "data": {"files": [str(data.demonstrations)]},
            "seed": config.seed,
        }
        return self._stack.run_job(JobKind.SFT, merged(known, config.sft), cpus=config.num_threads) / "model"

    def _train_reward_model(self, sft: Path, comparisons: tuple[Path, Path]) -> Path:
        config = self._config
        known = self._lengths() | {
            "model": {"path": str(sft)},
            "data": {"files": [str(comparisons[0])]},
            "eval_data": {"files": [str(comparisons[1])]},
            "seed": config.seed,
        }
        settings = merged(known, config.reward_model)
        run = self._stack.run_job(JobKind.REWARD_MODEL, settings, cpus=config.num_threads)
        metrics = json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]
        accuracy = Estimate(
            value=metrics["eval/accuracy"],
            low=metrics["eval/accuracy_low"],
            high=metrics["eval/accuracy_high"],
            num=int(metrics["eval/num_pairs"]),
        )
        self._console.say(f"held-out accuracy {accuracy} on {accuracy.num} pairs")
        self._figures["reward_model_accuracy"] = asdict(accuracy)
        # As the trainer counted them: rows that it could use, and rows that it left out.
        self._figures["num_comparisons"] = int(metrics.get("data/num_records", 0))
        self._figures["num_bad_comparisons"] = int(metrics.get("data/num_bad_rows", 0))
        return run / "model"

    def _train_ppo(self, data: Prepared, sft: Path, reward_model: Path, tokenizer: Tokenizer) -> None:
        config, addresses = self._config, self._stack.addresses
        known = {
            "actor": {"path": str(sft)},
            "critic": {"path": str(reward_model)},
            "prompts": {"files": [str(data.prompts)]},
            "max_prompt_tokens": config.max_prompt_tokens,
            "sampling": {"max_tokens": config.max_response_tokens, "temperature": config.temperature},
            "services": {
                "policies": [addresses["policy"]],
                "reference": addresses["reference"],
                "reward": addresses["reward"],
            },
            "num_threads": config.num_threads,
            "seed": config.seed,
        }
        probe = Probe(
            addresses["policy"],
            tokenizer,
            data.held_out_prompts[: config.evaluation.probe_prompts],
            data.gold,
            config,
            self._directory / "gold.jsonl",
        )
        with probe:
            self._stack.run_job(JobKind.PPO, merged(known, config.ppo), cpus=config.num_threads)

    def _lengths(self) -> dict[str, Any]:
        config = self._config
        return {"max_prompt_tokens": config.max_prompt_tokens, "max_response_tokens": config.max_response_tokens}

    def _answers(
        self, tokenizer: Tokenizer, prompts: Sequence[str], *, seed: int, samples_per_prompt: int = 1
    ) -> list[list[Answer]]:
        return asyncio.run(
            answer_all(
                self._stack.addresses["policy"],
                tokenizer,
                prompts,
                samples_per_prompt=samples_per_prompt,
                max_tokens=self._config.max_response_tokens,
                temperature=self._config.temperature,
                seed=seed,
            )
        )

    def _compare(self, data: Prepared, tokenizer: Tokenizer) -> tuple[Path, Path]:
        """Pairs sampled from the policy and compared by the annotator; all on prompts that PPO may see too."""
        source = self._config.source
        assert isinstance(source, LanguageSource)
        rng = random.Random(f"{self._config.seed}/comparisons")
        num = source.num_comparisons + source.num_held_out_comparisons
        prompts = [rng.choice(data.train_prompts) for _ in range(num)]
        rows, num_noisy = [], 0
        for first, second in self._answers(tokenizer, prompts, seed=10_000, samples_per_prompt=2):
            if not first.text or not second.text or first.text == second.text:
                continue  # nothing to choose between
            judgement = annotator.compare(
                first.prompt,
                (first.text, first.ended),
                (second.text, second.ended),
                temperature=source.annotator_temperature,
                rng=rng,
            )
            chosen, rejected = (first, second) if judgement.first_is_better else (second, first)
            num_noisy += judgement.first_is_better != (judgement.probability >= 0.5)
            rows.append({"prompt": first.prompt, "chosen": chosen.text, "rejected": rejected.text})
        if len(rows) <= source.num_held_out_comparisons:
            raise ValueError(
                f"only {len(rows)} of {num} pairs can be compared: the sft model says nothing, train it more"
            )
        noise = num_noisy / len(rows)
        self._console.say(
            f"{len(rows)} pairs compared, {noise:.0%} of them against the annotator's own rule; "
            f"{num - len(rows)} left out: alike, or an empty answer"
        )
        self._figures["annotator_noise"] = noise
        num_train = len(rows) - source.num_held_out_comparisons
        folder = self._directory / "data"
        return (
            write_rows(folder / "comparisons.train.jsonl", rows[:num_train]),
            write_rows(folder / "comparisons.held-out.jsonl", rows[num_train:]),
        )

    def _measure(self, data: Prepared, tokenizer: Tokenizer, when: str) -> Measured:
        prompts = data.held_out_prompts[: self._config.evaluation.num_prompts]
        answers = [one for (one,) in self._answers(tokenizer, prompts, seed=1_000_000)]
        gold = None
        if data.gold is not None:
            gold = [data.gold(answer.prompt, answer.text, answer.ended) for answer in answers]
            self._console.say(f"gold reward {when}: {mean(gold)} on {len(gold)} held-out prompts")
        return Measured(answers=answers, gold=gold)

    def _evaluate(self, before: Measured, after: Measured) -> None:
        addresses, figures = self._stack.addresses, self._figures
        temperature = self._config.temperature
        kl = mean(asyncio.run(divergences(addresses["reference"], after.answers, temperature=temperature)))
        scores = [asyncio.run(_scores(addresses["reward"], measured.answers)) for measured in (before, after)]
        figures |= {
            "kl": kl.value,
            "kl_interval": [kl.low, kl.high],
            "num_eval_prompts": len(after.answers),
            "weights_before": str(before.answers[0].version),
            "weights_after": str(after.answers[0].version),
            "reward_before": asdict(mean(scores[0])),
            "reward_after": asdict(mean(scores[1])),
            "reward_win_rate": asdict(win_rate(scores[1], scores[0])),
            "length_before": asdict(mean([len(answer.token_ids) for answer in before.answers])),
            "length_after": asdict(mean([len(answer.token_ids) for answer in after.answers])),
        }
        if before.gold is not None and after.gold is not None:
            rate = win_rate(after.gold, before.gold)
            figures |= {
                "gold_win_rate": rate.value,
                "gold_win_rate_interval": [rate.low, rate.high],
                "gold_before": asdict(mean(before.gold)),
                "gold_after": asdict(mean(after.gold)),
            }
            self._console.say(f"gold win rate over SFT: {rate} at a KL of {kl.value:.2f} nats a response")
        else:
            rate = win_rate(scores[1], scores[0])
            self._console.say(
                f"win rate over SFT by the reward model: {rate} at a KL of {kl.value:.2f} nats a response"
            )
        write_rows(self._directory / "evaluation.jsonl", _evaluation_rows(before, after, scores))

    def _write_summary(self) -> None:
        """The figures, and what they were reached with. Written last: it stands for a whole run."""
        config = self._config
        summary = {
            "name": config.name,
            "title": config.title,
            "about": config.about,
            "gold_win_rate": None,
            **self._figures,
            "seconds": round(self._console.seconds, 1),
            "phase_seconds": self._console.phase_seconds,
            "num_cores": os.cpu_count(),
            "config": config.model_dump(mode="json"),
        }
        partial = self._directory / "summary.partial"
        partial.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self._directory / "summary.json")


async def _scores(address: str, answers: Sequence[Answer]) -> list[float]:
    items = [ScoreItem(prompt=answer.prompt_ids, response=answer.token_ids) for answer in answers]
    async with AsyncRewardClient(address) as reward:
        return [score.unwrap() for score in await reward.score(items)]


def _evaluation_rows(before: Measured, after: Measured, scores: Sequence[Sequence[float]]) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for index, (old, new) in enumerate(zip(before.answers, after.answers, strict=True)):
        row = {
            "prompt": old.prompt,
            "before": old.text,
            "after": new.text,
            "reward_before": scores[0][index],
            "reward_after": scores[1][index],
        }
        if before.gold is not None and after.gold is not None:
            row |= {"gold_before": before.gold[index], "gold_after": after.gold[index]}
        rows.append(row)
    return rows
