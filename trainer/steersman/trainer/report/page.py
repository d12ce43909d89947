"""The page: plain data and plots into the template. Everything that a run wrote is text, and escaped."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import jinja2
from markupsafe import Markup

from steersman.trainer.report.load import ReportData, Row, RunData
from steersman.trainer.report.panels import Panel, gold_panels, run_panels
from steersman.trainer.report.plots import bar_plot, format_number

TEMPLATE: Final = "page.html.j2"
MAX_PAIRS: Final = 24
MAX_SAMPLES: Final = 24

KIND_TITLES: Final = {
    "sft": "Supervised fine-tuning",
    "reward_model": "Reward model",
    "ppo": "Proximal policy optimisation",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A headline number with what qualifies it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What the page shows of one run."""

    title: str
    facts: Sequence[tuple[str, str]]
    panels: Sequence[Panel]
    table: Sequence[tuple[str, str, str]]
    samples: Sequence[Row]
    config: Sequence[tuple[str, str]]


def render(data: ReportData) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup  # ours; names in it are escaped where it is drawn
    environment.filters["number"] = lambda value: format_number(float(value))
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    summary = data.summary
    return template.render(
        title=str(summary.get("title") or f"Run {data.directory.name}"),
        about=str(summary.get("about") or ""),
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        figures=headline(data),
        gold=gold_panels(data.gold),
        pairs=chosen_pairs(data.evaluation),
        phases=Markup(bar_plot(_numbers(summary.get("phase_seconds")), label="Seconds by phase", unit=" s")),
        comparison=before_after(summary),
        sections=[run_section(run) for run in reversed(data.runs)],
    )


def headline(data: ReportData) -> list[Figure]:
    """The numbers that a reader wants first."""
    summary = data.summary
    figures = []
    rate, label = summary.get("gold_win_rate"), "Gold win rate over SFT"
    interval = summary.get("gold_win_rate_interval")
    if rate is None and isinstance(summary.get("reward_win_rate"), Mapping):
        learnt = summary["reward_win_rate"]
        rate, interval, label = (
            learnt["value"],
            [learnt["low"], learnt["high"]],
            "Win rate over SFT by the reward model",
        )
    if rate is not None:
        note = f"95 % interval {_interval(interval, percent=True)}" if interval else ""
        figures.append(Figure(label=label, value=f"{rate:.1%}", note=note))
    if "kl" in summary:
        note = f"nats a response, 95 % {_interval(summary.get('kl_interval'))}" if summary.get("kl_interval") else ""
        figures.append(Figure(label="KL to SFT", value=format_number(summary["kl"]), note=note))
    accuracy = summary.get("reward_model_accuracy")
    if isinstance(accuracy, Mapping):
        note = f"95 % {_interval([accuracy['low'], accuracy['high']], percent=True)}, {accuracy['num']} held-out pairs"
        figures.append(Figure(label="Reward-model accuracy", value=f"{accuracy['value']:.1%}", note=note))
    if "num_eval_prompts" in summary:
        figures.append(
            Figure(label="Held-out prompts", value=str(summary["num_eval_prompts"]), note="one response each")
        )
    if "seconds" in summary:
        cores = f"on {summary['num_cores']} cores" if "num_cores" in summary else ""
        figures.append(Figure(label="Wall clock", value=_duration(float(summary["seconds"])), note=cores))
    if not figures:
        for run in data.runs:
            figures.append(Figure(label="Steps", value=str(run.num_steps), note=KIND_TITLES.get(run.kind, run.kind)))
            figures.append(Figure(label="Wall clock", value=_duration(run.seconds), note="first to last step"))
    return figures


def before_after(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (what, before, after) of what was measured on held-out prompts under both policies."""
    names = (("gold", "Gold reward"), ("reward", "Reward-model score"), ("length", "Response length, tokens"))
    rows = []
    for name, label in names:
        before, after = summary.get(f"{name}_before"), summary.get(f"{name}_after")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            rows.append((label, _estimate(before), _estimate(after)))
    return rows


def chosen_pairs(rows: Sequence[Row]) -> list[Row]:
    """Some evaluation rows, evenly over all, so that nobody picks the good ones."""
    stride = max(1, len(rows) // MAX_PAIRS)
    return list(rows[::stride])[:MAX_PAIRS]


def run_section(run: RunData) -> RunSection:
    """What the page shows of a run."""
    facts = [("Folder", run.directory.name), ("Steps", str(run.num_steps)), ("Wall clock", _duration(run.seconds))]
    if "state" in run.result:
        facts.append(("State", str(run.result["state"])))
    table = [
        (name, format_number(points[0][1]), format_number(points[-1][1]))
        for name, points in sorted(run.columns.items())
    ]
    return RunSection(
        title=KIND_TITLES.get(run.kind, run.kind),
        facts=facts,
        panels=run_panels(run.kind, run.columns),
        table=table,
        samples=_spread(run.samples, MAX_SAMPLES),
        config=[(name, _plain(value)) for name, value in _flat(run.config)],
    )


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _numbers(values: object) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()} if isinstance(values, Mapping) else {}


def _interval(bounds: Any, *, percent: bool = False) -> str:
    low, high = bounds
    return f"{low:.1%} to {high:.1%}" if percent else f"{format_number(low)} to {format_number(high)}"


def _estimate(values: Mapping[str, Any]) -> str:
    half = (values["high"] - values["low"]) / 2
    return f"{values['value']:.2f} ± {half:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
