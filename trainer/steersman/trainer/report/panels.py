"""Which metrics make which plot. Plots without data are left out; metrics of no plot go to the table alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from steersman.trainer.report.load import Row, columns_of
from steersman.trainer.report.plots import Points, Series, line_plot, stacked_plot

Columns = Mapping[str, Points]


@dataclass(frozen=True, kw_only=True)
class PlotSpec:
    """A plot: its title, what it says, and its lines as (metric, legend)."""

    title: str
    note: str
    lines: Sequence[tuple[str, str]]
    stacked: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A drawn plot with its legend of (colour class, name, last value)."""

    title: str
    note: str
    svg: str
    legend: Sequence[tuple[str, str, float]]


PPO_PLOTS: Final = (
    PlotSpec(
        title="Reward",
        note="Score of the reward model, and what is optimised: the score less the KL penalty.",
        lines=(
            ("objective/scores", "score"),
            ("objective/rlhf_reward", "score - KL penalty"),
            ("eval/scores", "held out"),
        ),
    ),
    PlotSpec(
        title="KL to the reference",
        note="Nats a response, estimated on the responses drawn.",
        lines=(("objective/kl", "training"), ("eval/kl", "held out")),
    ),
    PlotSpec(
        title="Response length",
        note="Tokens, end-of-sequence included.",
        lines=(("rollout/response_length_mean", "mean"), ("eval/response_length_mean", "held out")),
    ),
    PlotSpec(
        title="Entropy",
        note="Nats: of a whole response by its log-probs, or of a token over the vocabulary.",
        lines=(("objective/entropy", "response"), ("policy/entropy_avg", "token")),
    ),
    PlotSpec(
        title="Policy loss",
        note="Clipped surrogate, mean over tokens.",
        lines=(("loss/policy_avg", "policy"), ("policy/loss", "policy")),
    ),
    PlotSpec(
        title="Value loss",
        note="Clipped squared error of the critic.",
        lines=(("loss/value_avg", "value"), ("value/loss", "value")),
    ),
    PlotSpec(
        title="Clip fraction",
        note="Share of tokens whose ratio, or value, was clipped.",
        lines=(
            ("policy/clipfrac_avg", "policy"),
            ("policy/clipfrac", "policy"),
            ("val/clipfrac_avg", "value"),
            ("value/clipfrac", "value"),
        ),
    ),
    PlotSpec(
        title="Approximate KL of an update",
        note="Between the policy before and after, mean over tokens.",
        lines=(("policy/approxkl_avg", "approx. KL"), ("policy/approxkl", "approx. KL")),
    ),
    PlotSpec(
        title="Explained variance",
        note="Of the returns by the critic; 1 is perfect, 0 is no better than their mean.",
        lines=(("val/explained_variance", "explained variance"),),
    ),
    PlotSpec(
        title="Engine and trainer",
        note="Mean absolute difference of their log-probs: of all tokens, and where the trained weights drew the "
        "whole response (on policy): arithmetic alone.",
        lines=(
            ("mismatch/logprob_abs_mean", "all"),
            ("mismatch/logprob_abs_mean_on_policy", "on policy"),
            ("behaviour/abs_diff", "all"),
        ),
    ),
    PlotSpec(
        title="Staleness",
        note="Steps between the weights that drew a token and those trained on it.",
        lines=(("rollout/staleness_mean", "mean"), ("rollout/staleness_max", "oldest")),
    ),
    PlotSpec(
        title="Seconds by phase",
        note="Wall clock of a step as the trainer's main thread spends it.",
        lines=(
            ("time/update_seconds", "update"),
            ("time/rollout_seconds", "waiting for rollouts"),
            ("time/push_seconds", "pushing weights"),
            ("time/evaluation_seconds", "evaluation"),
            ("time/checkpoint_seconds", "checkpoint"),
        ),
        stacked=True,
    ),
    PlotSpec(
        title="Trainer busy share",
        note="Time computing rather than waiting for the network or a service.",
        lines=(("trainer/busy_share", "busy"),),
    ),
    PlotSpec(title="Throughput", note="Samples a second.", lines=(("eps", "samples/s"),)),
)

SUPERVISED_PLOTS: Final = (
    PlotSpec(
        title="Loss", note="Training, and held-out data.", lines=(("loss", "training"), ("eval/loss", "held out"))
    ),
    PlotSpec(
        title="Accuracy",
        note="Pairs ranked as people did, or next tokens predicted.",
        lines=(("accuracy", "training"), ("eval/accuracy", "held out")),
    ),
    PlotSpec(
        title="Reward gap",
        note="Score of the chosen response less that of the rejected.",
        lines=(("reward_gap", "training"), ("eval/reward_gap", "held out")),
    ),
    PlotSpec(title="Learning rate", note="", lines=(("lr", "learning rate"),)),
    PlotSpec(title="Gradient norm", note="Before clipping.", lines=(("grad_norm", "norm"),)),
    PlotSpec(title="Throughput", note="Tokens a second.", lines=(("time/tokens_per_s", "tokens/s"),)),
)

GOLD_PLOTS: Final = (
    PlotSpec(
        title="Gold reward",
        note="By the hidden rule, on held-out prompts, read from the live policy during training.",
        lines=(("gold_reward", "gold reward"),),
    ),
)


def run_panels(kind: str, columns: Columns) -> list[Panel]:
    """The plots of a run; of a kind that is not known, one for each metric."""
    if kind == "ppo":
        return draw(PPO_PLOTS, columns)
    if kind in ("sft", "reward_model"):
        return draw(SUPERVISED_PLOTS, columns)
    return draw([PlotSpec(title=name, note="", lines=((name, name),)) for name in sorted(columns)], columns)


def gold_panels(rows: Sequence[Row]) -> list[Panel]:
    """The plot of the hidden score over PPO steps, if it was measured."""
    return draw(GOLD_PLOTS, {name: sorted(points) for name, points in columns_of(rows).items()})


def draw(plots: Sequence[PlotSpec], columns: Columns) -> list[Panel]:
    """Those plots that have data. Of lines with one legend, the first that has data is drawn."""
    panels = []
    for plot in plots:
        chosen: dict[str, Points] = {}
        for metric, legend in plot.lines:
            points = columns.get(metric, ())
            if points and legend not in chosen:
                chosen[legend] = points
        if not chosen:
            continue
        series = [Series(name=legend, points=points) for legend, points in chosen.items()]
        svg = stacked_plot(series, label=plot.title) if plot.stacked else line_plot(series, label=plot.title)
        legend_rows = [(f"c{index}", line.name, line.points[-1][1]) for index, line in enumerate(series)]
        panels.append(Panel(title=plot.title, note=plot.note, svg=svg, legend=legend_rows))
    return panels
