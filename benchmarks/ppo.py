"""PPO samples per second, Steersman against TRL's PPOTrainer, in two regimes.

Both sides train the same 3.4M-parameter model from the same files, in float32, with a critic and a reward model of
the same size, on the same prompts: 64 samples a batch, one epoch, one optimizer step, prompts of 32 tokens, at most 64
tokens of response.

- fixed: end-of-sequence has no chance, every response has full length.
- natural: responses end by themselves, after 16 tokens on average.

Steersman runs as it is deployed: policy (vLLM), reference, reward and trainer are processes of their own under the
supervisor, and a job is sent to TrainerService. TRL runs as one process in an environment of its own with all cores.
They take turns, A B A B; the side that waits computes nothing (the processor time of the idle services is in the
detail). The first batches of each turn warm up and do not count, nor does Steersman's last one, during which it
generates no further batch. A figure is the median over turns of the ratio of samples per second.

Steersman draws the next batch during the update, from weights up to one step older, and corrects for it by importance
weights: its default. TRL has no such mode. The detail has one more turn without (`on_policy`).
"""

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks import toymodel
from benchmarks.context import Context, Measured
from benchmarks.figures import paired_ratio, spread
from benchmarks.stack import CORES, Running, Service, running, tail, thread_environment
from steersman.client import TrainerClient
from steersman.client.types import JobState, StepMetrics
from steersman.trainer.stages.run import METRICS_FILE, read_rows

BATCH: Final = 64
RESPONSE_TOKENS: Final = 64
REGIMES: Final[Mapping[str, float | None]] = {"fixed": None, "natural": RESPONSE_TOKENS / 4}
LEARNING_RATE: Final = 1e-6
MISSING_EOS_PENALTY: Final = 1.0
# The whole batch in one pass: TRL took a few per cent longer in passes of 16.
TRL_MICRO_BATCH: Final = 64
TURN_SECONDS: Final = 900.0

_ROOT: Final = Path(__file__).parent.parent
_TRL: Final = Path(__file__).parent / "trl"
_SERVICES: Final = ("policy", "reference", "reward", "trainer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure. `warm_up` and `counted` are batches of one turn."""

    turns: int
    warm_up: int
    counted: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side did in one turn, counted batches only."""

    samples_per_s: float
    mean_response_tokens: float
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files that both sides read."""

    policy: Path
    reward: Path
    prompts: Path
    directory: Path


def run(context: Context) -> Measured:
    """Measures both figures."""
    plan = Plan(turns=1, warm_up=1, counted=1) if context.quick else Plan(turns=3, warm_up=2, counted=10)
    subprocess.run([str(_TRL / "setup")], check=True)
    figures, detail = {}, {}
    for regime, mean_tokens in REGIMES.items():
        inputs = _write_inputs(context.directory / regime, mean_tokens)
        figures[f"ppo_samples_per_s_vs_trl_{regime}"], detail[regime] = _compare(inputs, plan)
    return Measured(figures=figures, detail=detail | {"plan": dataclasses.asdict(plan)})


def _compare(inputs: Inputs, plan: Plan) -> tuple[float, dict[str, Any]]:
    ours, theirs = [], []
    idle: list[float] = []
    with running(_services(inputs), inputs.directory / "services") as stack:
        for number in range(plan.turns):
            before = stack.cpu_seconds()
            theirs.append(_trl_turn(inputs, plan, number))
            idle.append(sum(stack.cpu_seconds().values()) - sum(before.values()))
            ours.append(_steersman_turn(inputs, plan, f"turn-{number}", stack))
        on_policy = _steersman_turn(inputs, plan, "on-policy", stack, max_staleness=0)
    rates = [turn.samples_per_s for turn in ours], [turn.samples_per_s for turn in theirs]
    ratio = paired_ratio(*rates)
    return ratio.median, {
        "ratio": dataclasses.asdict(ratio),
        "steersman_samples_per_s": dataclasses.asdict(spread(rates[0])),
        "trl_samples_per_s": dataclasses.asdict(spread(rates[1])),
        "idle_services_cpu_s_per_turn": round(fmean(idle), 2),
        "on_policy": dataclasses.asdict(on_policy),
        "steersman_turns": [dataclasses.asdict(turn) for turn in ours],
        "trl_turns": [dataclasses.asdict(turn) for turn in theirs],
    }


def _write_inputs(directory: Path, mean_tokens: float | None) -> Inputs:
    policy = toymodel.build_policy(seed=0, mean_tokens=mean_tokens, limit=RESPONSE_TOKENS)
    return Inputs(
        policy=toymodel.save(policy, directory / "policy"),
        reward=toymodel.save(toymodel.build_scalar_model(policy, seed=1), directory / "reward"),
        prompts=toymodel.save_prompts(
            directory / "prompts.jsonl", toymodel.build_prompts(8 * BATCH, toymodel.PROMPT_TOKENS, seed=2)
        ),
        directory=directory,
    )


def _services(inputs: Inputs) -> list[Service]:
    policy, reward = str(inputs.policy), str(inputs.reward)
    settings: dict[str, dict[str, Any]] = {
        "policy": {"model": policy, "dtype": "float32", "max_num_seqs": BATCH, "kv_cache_mib": 256},
        "reference": {"model": policy, "dtype": "float32"},
        "reward": {"scorers": {"reward": {"model": reward, "dtype": "float32"}}},
        "trainer": {"runs_directory": str(inputs.directory / "runs")},
    }
    return [Service(name=name, settings=settings[name], environment=thread_environment(CORES)) for name in _SERVICES]


def job_config(inputs: Inputs, addresses: Mapping[str, str], *, steps: int, max_staleness: int) -> dict[str, Any]:
    """The settings of a PPO job that does what the TRL baseline does."""
    optimizer = {"learning_rate": LEARNING_RATE, "schedule": "constant"}
    return {
        "actor": {"path": str(inputs.policy)},
        "critic": {"path": str(inputs.reward)},
        "prompts": {"files": [str(inputs.prompts)]},
        "max_prompt_tokens": toymodel.PROMPT_TOKENS,
        "services": {
            "policies": [addresses["policy"]],
            "reference": addresses["reference"],
            "reward": addresses["reward"],
        },
        "sampling": {"max_tokens": RESPONSE_TOKENS, "temperature": 1.0},
        "total_steps": steps,
        "prompts_per_step": BATCH,
        "num_epochs": 1,
        "num_minibatches": 1,
        "micro_batch_tokens": 1024,
        "optimizer": optimizer,
        "critic_optimizer": optimizer,
        "kl": {"coefficient": 0.05},
        "missing_eos_penalty": MISSING_EOS_PENALTY,
        "dtype": "float32",
        "num_threads": CORES,
        "save_every_steps": steps,
        "max_staleness": max_staleness,
    }


def _steersman_turn(inputs: Inputs, plan: Plan, name: str, stack: Running, *, max_staleness: int = 1) -> Turn:
    # One batch more: the last one has nothing to generate beside its update.
    steps = plan.warm_up + plan.counted + 1
    with TrainerClient(stack.addresses["trainer"]) as client:
        config = job_config(inputs, stack.addresses, steps=steps, max_staleness=max_staleness)
        job = client.create_job("ppo", config, job_id=name)
        cpu: dict[int, dict[str, float]] = {}
        for event in client.watch_job(job.id, reconnect_seconds=TURN_SECONDS):
            if isinstance(event.event, StepMetrics):
                cpu[event.event.step] = stack.cpu_seconds()
        job = client.get_job(job.id)
    folder = inputs.directory / "runs" / job.id
    if job.state is not JobState.SUCCEEDED:
        raise RuntimeError(f"the PPO job is {job.state}: {job.error}\n{tail(folder / 'log.txt')}")
    turn = steersman_turn(read_rows(folder / METRICS_FILE), plan)
    first, last = cpu[plan.warm_up], cpu[plan.warm_up + plan.counted]
    cpu_per_batch = {name: round((last[name] - first[name]) / plan.counted, 3) for name in _SERVICES}
    return dataclasses.replace(turn, detail={**turn.detail, "processor_seconds_per_batch": cpu_per_batch})


def steersman_turn(rows: Sequence[Mapping[str, float]], plan: Plan) -> Turn:
    """What the metrics of a job say about the batches that count; the clock runs from the end of the warm-up on."""
    first, counted = rows[plan.warm_up - 1], rows[plan.warm_up : plan.warm_up + plan.counted]
    if len(counted) < plan.counted:
        raise RuntimeError(f"the job logged {len(rows)} batches, needed are {plan.warm_up + plan.counted}")
    seconds = counted[-1]["time"] - first["time"]
    samples = counted[-1]["episode"] - first["episode"]
    phases = sorted({name for row in counted for name in row if name.startswith("time/")})
    return Turn(
        samples_per_s=samples / seconds,
        mean_response_tokens=_mean(counted, "rollout/response_length_mean"),
        detail={
            "trainer_busy_share": _mean(counted, "trainer/busy_share"),
            "seconds_per_batch": {name.removeprefix("time/"): _mean(counted, name) for name in phases},
            "rollout_seconds_from_first_prompt": _mean(counted, "rollout/seconds"),
            "push_pause_seconds": _mean(counted, "push/pause_seconds"),
            "staleness_mean": _mean(counted, "rollout/staleness_mean"),
            "mismatch_kl": _mean(counted, "mismatch/kl"),
            "dropped_samples": _mean(counted, "rollout/dropped"),
        },
    )


def _trl_turn(inputs: Inputs, plan: Plan, number: int) -> Turn:
    report = inputs.directory / f"trl-{number}.json"
    options = {
        "policy": inputs.policy,
        "reward": inputs.reward,
        "prompts": inputs.prompts,
        "report": report,
        "batches": plan.warm_up + plan.counted,
        "batch": BATCH,
        "micro-batch": TRL_MICRO_BATCH,
        "response-tokens": RESPONSE_TOKENS,
        "threads": CORES,
        "seed": number,
        "learning-rate": LEARNING_RATE,
        "missing-eos-penalty": MISSING_EOS_PENALTY,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    log = inputs.directory / f"trl-{number}.log"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [str(_ROOT / ".venv-bench" / "bin" / "python"), str(_TRL / "baseline.py"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_trl_environment(),
            timeout=TURN_SECONDS,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the TRL baseline exited with status {done.returncode}\n{tail(log)}")
    return trl_turn(json.loads(report.read_text(encoding="utf-8")), plan)


def trl_turn(report: Mapping[str, Any], plan: Plan) -> Turn:
    """What the report of `baseline.py` says about the batches that count."""
    seconds = report["seconds"][plan.warm_up :]
    if len(seconds) != plan.counted:
        raise RuntimeError(f"TRL did {len(report['seconds'])} batches, needed are {plan.warm_up + plan.counted}")
    generation = report["generation_seconds"][plan.warm_up :]
    return Turn(
        samples_per_s=BATCH * len(seconds) / sum(seconds),
        mean_response_tokens=fmean(report["mean_response_tokens"][plan.warm_up :]),
        detail={
            "seconds_per_batch": {"step_seconds": fmean(seconds), "generation_seconds": fmean(generation)},
            "software": report["software"],
        },
    )


def _trl_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(CORES), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else 0.0
