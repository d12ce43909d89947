"""Line and stacked-area plots as inline SVG: no script, no external resource, colours from the page's style."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

Points = Sequence[tuple[float, float]]

WIDTH: Final = 380.0
HEIGHT: Final = 205.0
_LEFT: Final = 50.0
_RIGHT: Final = 14.0
_TOP: Final = 12.0
_BOTTOM: Final = 30.0

# More points than pixels only make the page heavy.
MAX_POINTS: Final = 400
# Beyond this many points the raw line turns faint and a smoothed one shows the trend.
SMOOTH_FROM: Final = 40
NUM_COLOURS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its name in the legend and its (step, value) points in ascending steps."""

    name: str
    points: Points


def line_plot(series: Sequence[Series], *, label: str) -> str:
    """An SVG of lines over steps; `label` is what a screen reader says. Empty if there is nothing to draw."""
    drawn = [Series(name=line.name, points=thin(line.points)) for line in series if line.points]
    if not drawn:
        return ""
    frame = _Frame.around([point for line in drawn for point in line.points])
    parts = [_axes(frame)]
    for index, line in enumerate(drawn):
        colour = f"c{index % NUM_COLOURS}"
        smooth = len(line.points) >= SMOOTH_FROM
        parts.append(_path(frame, line.points, f"line {colour}" + (" raw" if smooth else "")))
        if smooth:
            parts.append(_path(frame, smoothed(line.points), f"line {colour}"))
        parts.append(_dots(frame, line, colour))
    return _svg("".join(parts), label)


def stacked_plot(series: Sequence[Series], *, label: str) -> str:
    """An SVG of areas on top of each other, the first at the bottom. A step that a series lacks counts as 0."""
    drawn = [line for line in series if line.points]
    steps = [step for step, _ in thin([(step, 0.0) for step in sorted({s for line in drawn for s, _ in line.points})])]
    if not steps:
        return ""
    values = [dict(line.points) for line in drawn]
    tops = [
        [sum(column.get(step, 0.0) for column in values[: upto + 1]) for step in steps] for upto in range(len(drawn))
    ]
    frame = _Frame.around([(steps[0], 0.0), *zip(steps, tops[-1], strict=True)])
    parts = []
    floor = [0.0] * len(steps)
    for index, (line, top) in enumerate(zip(drawn, tops, strict=True)):
        upper = [frame.at(step, value) for step, value in zip(steps, top, strict=True)]
        lower = [frame.at(step, value) for step, value in zip(steps, floor, strict=True)]
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
        parts.append(
            f'<polygon class="area c{index % NUM_COLOURS}" points="{outline}">'
            f"<title>{escape(line.name)}</title></polygon>"
        )
        floor = top
    return _svg("".join(parts) + _axes(frame), label)


def bar_plot(values: Mapping[str, float], *, label: str, unit: str = "") -> str:
    """An SVG of horizontal bars, one for each name. Empty if there is none."""
    if not values:
        return ""
    row, left = 24.0, 104.0
    longest = max(max(values.values()), 1e-9)
    parts = []
    for index, (name, value) in enumerate(values.items()):
        y = 6 + index * row
        width = max(0.0, value) / longest * (WIDTH - left - 64)
        parts.append(
            f'<text class="tick" x="{left - 8:.0f}" y="{y + 14:.1f}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar c0" x="{left:.0f}" y="{y:.1f}" width="{width:.1f}" height="18" rx="3"/>'
            f'<text class="tick strong" x="{left + width + 6:.1f}" y="{y + 14:.1f}">'
            f"{escape(format_number(value) + unit)}</text>"
        )
    return _svg("".join(parts), label, height=12 + row * len(values))


def thin(points: Points) -> Points:
    """At most MAX_POINTS points: the mean of each run of neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def smoothed(points: Points) -> Points:
    """Exponential moving average over about a twentieth of the points, without a bias towards the first."""
    keep = 1.0 - min(1.0, 20.0 / len(points))
    total = weight = 0.0
    result = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1.0
        result.append((step, total / weight))
    return result


def nice_ticks(low: float, high: float, *, num: int = 5) -> list[float]:
    """Round numbers, about `num` of them, that cover [low, high] from outside."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / max(1, num - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def format_number(value: float) -> str:
    """A number as short as it stays readable: 0.0123, 1.5, 12,345, 3e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.2g}"
    if size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    text = f"{value:.4g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The plotted range, and where it lies on the canvas."""

    xs: Sequence[float]
    ys: Sequence[float]
    x_low: float
    x_high: float

    @classmethod
    def around(cls, points: Points) -> "_Frame":
        x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
        xs = [tick for tick in nice_ticks(x_low, x_high, num=5) if x_low <= tick <= x_high and tick == int(tick)]
        if x_high <= x_low:
            x_low, x_high, xs = x_low - 1, x_low + 1, [x_low]
        ys = nice_ticks(min(y for _, y in points), max(y for _, y in points))
        return cls(xs=xs, ys=ys, x_low=x_low, x_high=x_high)

    def at(self, x: float, y: float) -> tuple[float, float]:
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        share = (x - self.x_low) / (self.x_high - self.x_low)
        height = (y - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return _LEFT + share * (right - _LEFT), bottom - height * (bottom - _TOP)


def _axes(frame: _Frame) -> str:
    parts = []
    for tick in frame.ys:
        _, y = frame.at(frame.x_low, tick)
        kind = "zero" if tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>'
        )
    for tick in frame.xs:
        x, _ = frame.at(tick, frame.ys[0])
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10:.1f}" text-anchor="middle">{format_number(tick)}</text>'
        )
    return "".join(parts)


def _path(frame: _Frame, points: Points, css: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.at(*point) for point in points))
    return f'<polyline class="{css}" points="{places}"/>'


def _dots(frame: _Frame, line: Series, colour: str) -> str:
    """A mark where the line ends, and places to hover over for the numbers."""
    parts = []
    for index, (step, value) in enumerate(line.points):
        x, y = frame.at(step, value)
        kind = f"dot {colour}" if index == len(line.points) - 1 or len(line.points) <= 12 else "hover"
        title = f"{line.name}: {format_number(value)} at step {format_number(step)}"
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(title)}</title></circle>'
        )
    return "".join(parts)


def _svg(content: str, label: str, *, height: float = HEIGHT) -> str:
    box = f"0 0 {WIDTH:.0f} {height:.0f}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label, quote=True)}">{content}</svg>'
