"""Makes a result of a finished pipeline run: python -m benchmarks.record RUN_DIR [--output DIR]

RUN_DIR is what `examples/pipeline.py` wrote. The figures come from its `summary.json` and from the metrics of its PPO
job, and carry the name of the pipeline: `demo_gold_win_rate`, `hh_rlhf_reward_model_accuracy`, ...
"""

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import RESULTS
from benchmarks.figures import Target
from benchmarks.machine import describe_machine
from benchmarks.results import Result, write_result, write_table

# Steps of the PPO job whose reward and KL go into the detail.
_NUM_CURVE_POINTS = 12
_WHAT = {
    "gold_win_rate": "share of held-out prompts on which the hidden rule prefers PPO's answer to SFT's, ties half",
    "reward_win_rate": "share of held-out prompts on which the reward model prefers PPO's answer to SFT's, ties half",
    "reward_model_accuracy": "accuracy of the reward model on held-out comparisons",
    "kl": "KL of the PPO policy from SFT on held-out prompts, nats a response",
    "seconds": "wall-clock seconds of the whole pipeline",
}
_AT_LEAST = {"demo_gold_win_rate": 0.75}
_AT_MOST = {"demo_seconds": 300.0}


def result_of(run: Path, *, date: str, machine: Mapping[str, Any]) -> Result:
    """The result of a run folder. FileNotFoundError if it holds no finished run."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    name = str(summary["name"]).replace("-", "_")
    figures = {f"{name}_{key}": _value(summary[key]) for key in _WHAT if summary.get(key) is not None}
    targets = {
        figure: Target(
            what=_WHAT[figure.removeprefix(f"{name}_")],
            at_least=_AT_LEAST.get(figure),
            at_most=_AT_MOST.get(figure),
        )
        for figure in figures
    }
    detail = {key: value for key, value in summary.items() if key not in ("name", "about", "title")}
    # What was read is named by its pipeline; where it lay is nobody's business.
    detail.get("config", {}).pop("source", None)
    detail["ppo_curve"] = _curve(run)
    return Result(name=name, date=date, machine=machine, figures=figures, targets=targets, detail={"detail": detail})


def _value(entry: Any) -> float:
    """A number, or the value of an estimate with its interval."""
    return float(entry["value"]) if isinstance(entry, dict) else float(entry)


def _curve(run: Path) -> list[dict[str, float]]:
    """Reward and KL at steps spread evenly over the PPO job, first and last among them."""
    (metrics,) = run.glob("jobs/ppo*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = len(rows) - 1
    chosen = sorted({round(last * point / (_NUM_CURVE_POINTS - 1)) for point in range(_NUM_CURVE_POINTS)})
    names = ("objective/scores", "objective/kl", "rollout/response_length_mean", "trainer/busy_share")
    return [{"step": rows[index]["step"]} | {name: rows[index][name] for name in names} for index in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the result and the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of examples/pipeline.py")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and table")
    arguments = parser.parse_args(argv)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        result = result_of(arguments.run, date=today, machine=describe_machine())
    except FileNotFoundError as error:
        parser.error(f"run is {arguments.run}, allowed: the folder of a finished pipeline run ({error.filename})")
    print(write_result(arguments.output, result))
    write_table(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
