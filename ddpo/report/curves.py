"""Curves as inline SVG: several runs in one figure, told apart by colour, dash and marker, with every number in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from ddpo.report.read import Run
from ddpo.run_log import CURVES

WIDTH, HEIGHT = 440, 230  # of a figure, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 34  # margins that hold ticks and labels
STYLES = 4  # of lines, see report.css; further runs repeat them
ERRORS = {"reward_mean": "reward_standard_error"}  # of validations: what is drawn -> its standard error
FIGURES = {**CURVES, "learning rate": (None, "learning_rate")}  # title -> (kind of line or None for any, key)


@dataclass
class Curve:
    """One run in one figure. points: (x in epochs, y, standard error or None), all finite; style: 0 ... STYLES - 1."""

    run: str
    style: int
    points: list[tuple[float, float, float | None]]


@dataclass
class Figure:
    """title, what x counts, the curves, and their drawing ("" where no run has a number)."""

    title: str
    x: str
    curves: list[Curve]
    svg: Markup

    def rows(self) -> list[tuple[float, list[str]]]:
        """The table: (x, one cell for each curve)."""
        cells = [{x: _cell(y, error) for x, y, error in curve.points} for curve in self.curves]
        return [(x, [column.get(x, "") for column in cells]) for x in sorted({x for column in cells for x in column})]


def figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures of FIGURES and one for every judge of the validations."""
    found = []
    for title, (kind, key) in FIGURES.items():
        error = ERRORS.get(key) if kind == "validation" else None
        lines = [run.of_kind(kind) if kind else [line for line in run.lines if key in line] for run in runs]
        points = [_points(some, key, error) for some in lines]
        found.append(_figure(title, "epochs done" if kind == "validation" else "epoch", runs, points))
    for name in dict.fromkeys(name for run in runs for v in run.validations for name in v.judges):
        points = [
            [(v.epochs_done, *mean_and_error(v.judges[name])) for v in run.validations if name in v.judges]
            for run in runs
        ]
        points = [[point for point in some if math.isfinite(point[1])] for some in points]
        found.append(_figure(f"judge: {name}", "epochs done", runs, points))
    return found


def mean_and_error(values) -> tuple[float, float]:
    """Mean of values (N,) and its standard error, 0 for a single one; NaN does not count."""
    values = values[np.isfinite(values)]
    count = len(values)
    if not count:
        return math.nan, 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0


def _points(lines, key, error_key):
    """[(x, y, error)]; the updates of an epoch are spread between it and the next."""
    in_epoch = {}
    for line in lines:
        in_epoch[line["epoch"]] = max(in_epoch.get(line["epoch"], 0), line.get("update", 0) + 1)
    points = []
    for line in lines:
        y, error = line.get(key), line.get(error_key) if error_key else None
        if isinstance(y, (int, float)) and math.isfinite(y):
            points.append((line["epoch"] + line.get("update", 0) / in_epoch[line["epoch"]], y, error))
    return points


def _figure(title, x, runs, points):
    curves = [Curve(run.name, i % STYLES, one) for i, (run, one) in enumerate(zip(runs, points, strict=True)) if one]
    return Figure(title, x, curves, draw(title, x, curves) if curves else Markup(""))


def draw(title: str, x_label: str, curves: Sequence[Curve]) -> Markup:
    """The SVG of one or more curves; report.css gives it its colours."""
    reach = [y + sign * (error or 0) for curve in curves for _, y, error in curve.points for sign in (-1, 1)]
    x_ticks = _ticks([x for curve in curves for x, _, _ in curve.points], whole=True)
    y_ticks = _ticks(reach)
    x_at = _scale(x_ticks, LEFT, WIDTH - RIGHT)
    y_at = _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = []
    for value in y_ticks:
        y = y_at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value, y_ticks)}</text>')
    for value in x_ticks:
        x, y = f"{x_at(value):.1f}", HEIGHT - BOTTOM + 16
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{_tick(value, x_ticks)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    for curve in curves:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, _ in curve.points)
        parts.append(f'<g class="curve style{curve.style}"><polyline points="{path}"/>')
        for x, y, error in curve.points:
            a, b = x_at(x), y_at(y)
            if error:
                low, high = (f"{y_at(y + sign * error):.1f}" for sign in (-1, 1))
                parts.append(f'<path d="M{a:.1f} {low}V{high}M{a - 3:.1f} {low}h6M{a - 3:.1f} {high}h6"/>')
            label = f"{curve.run}, {x_label} {x:g}: {_cell(y, error)}"
            parts.append(
                f'<path class="point" data-run="{escape(curve.run)}" data-x="{x:g}" data-y="{y!r}" data-at="{a:.1f}" '
                f'd="{_marker(curve.style, a, b)}"><title>{escape(label)}</title></path>'
            )
        parts.append("</g>")
    parts.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>')


def _marker(style, x, y, r=3.5):
    """The outline of a circle, square, triangle or diamond around a point."""
    return (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r}h{-2 * r - 2}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
    )[style]


def _ticks(values, whole=False):
    low, high = min(values), max(values)
    if low == high:  # zero at the bottom, and another flat line in the middle
        room = 1.0 if whole or not low else abs(low) / 10
        low, high = (low, low + room) if whole or not low else (low - room, high + room)
    return [float(tick) for tick in MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)]


def _scale(ticks, start, end):
    low, high = ticks[0], ticks[-1]
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _tick(value, ticks):
    """A tick with as many digits as tell it from the next one."""
    step, largest = ticks[1] - ticks[0], max(abs(tick) for tick in ticks)
    if largest < 1e-3 or largest >= 1e5:
        digits = max(0, round(math.log10(largest / step)))
        return f"{value:.{digits}e}" if value else "0"
    return f"{value:.{max(0, math.ceil(-math.log10(step) - 1e-9))}f}"


def _cell(y, error):
    text = f"{y:.4g}" if error is None else f"{y:.4f}"
    return f"{text} ± {error:.4f}" if error else text
