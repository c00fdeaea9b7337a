"""The figures of a report: means over seeds, with their 95 % intervals as bands or bars."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.declaration import Figure
from mbn_jax.sweeps.labels import axis_label, in_percent, metric_label, sentence
from mbn_jax.sweeps.results import AXIS, RUN
from mbn_jax.sweeps.summary import CONFIDENCE, finished, interval, measured, unfinished

# Okabe and Ito's colours, told apart by colour-blind readers; markers and dashes for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":")
LINES_BESIDE_A_LEGEND = 4  # With more, the legend would cover them.

AxisValues = Mapping[str, Sequence]
"""Name of each axis and its values, in order."""


def draw(figure: Figure, results: pd.DataFrame, axes: AxisValues) -> bytes:
    """Draws one figure of the results, a PNG."""
    rows = results
    for axis, value in figure.fixed.items():
        rows = _at(rows, axis, value)
    panels = axes[figure.panels] if figure.panels else [None]
    canvas, plots = _canvas(len(panels), shares_x=figure.x != "step")
    for panel, plot in zip(panels, plots, strict=True):
        _draw_lines(plot, figure, _at(rows, figure.panels, panel), rows, axes)
        if figure.panels:
            plot.set_title(f"{axis_label(figure.panels)} {_shown(panel)}", fontsize=10)
        plot.set(xlabel=_shown(axis_label(figure.x)), ylabel=_shown(metric_label(figure.y)))
        if figure.x != "step":
            plot.label_outer()
        _scale_y(plot, figure)
        plot.grid(alpha=0.3)
    if figure.lines:
        _add_legend(canvas, plots[0], figure.lines)
    content = io.BytesIO()
    canvas.savefig(content, format="png", dpi=160)
    return content.getvalue()


def _at(rows: pd.DataFrame, axis: str | None, value: Any) -> pd.DataFrame:
    """Returns the rows with a value on an axis; all, where there is no such axis."""
    return rows if axis is None else rows[rows[AXIS, axis] == value]


def _shown(value: Any) -> str:
    """Returns a text that Matplotlib shows as it is: no formula, no label of an unnamed artist."""
    text = str(value).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _canvas(num_panels: int, *, shares_x: bool) -> tuple[Canvas, list[Axes]]:
    """Returns a canvas and its panels; they share x unless runs of one may be longer."""
    columns = 2 if num_panels == 4 else min(num_panels, 3)
    height = -(-num_panels // columns)
    size = (max(6.4, 3.6 * columns), 3.8 * height + 0.4)
    canvas = Canvas(figsize=size, layout="constrained")
    grid = canvas.subplots(height, columns, squeeze=False, sharex=shares_x, sharey=True)
    for unused in grid.flat[num_panels:]:
        unused.set_visible(False)
    return canvas, list(grid.flat[:num_panels])


def _draw_lines(
    plot: Axes, figure: Figure, panel: pd.DataFrame, rows: pd.DataFrame, axes: AxisValues
) -> None:
    """Draws the lines of a panel, which shows the results `panel`; all panels show `rows`."""
    lines = axes[figure.lines] if figure.lines else [None]
    for i, line in enumerate(lines):
        # Without a value in any panel: group normalization, for example, has no statistics.
        if figure.lines and measured(_at(rows, figure.lines, line), figure.y).isna().all():
            continue
        style = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
            "markersize": 4,
            "label": _shown(line),
        }
        selected = _at(panel, figure.lines, line)
        if figure.x == "step":
            _draw_curve(plot, selected, figure.y, style)
        else:
            shift = (i - (len(lines) - 1) / 2) * 0.06
            _draw_points(plot, selected, figure, axes[figure.x], shift, style)


def _draw_curve(plot: Axes, rows: pd.DataFrame, metric: str, style: dict[str, Any]) -> None:
    values = in_percent(measured(rows, metric), metric)
    values = values[rows[RUN, "outcome"] == store.FINISHED].dropna()
    by_step = values.groupby(rows[RUN, "step"])
    mean, half = by_step.mean(), by_step.agg(interval).fillna(0)
    plot.plot(mean.index, mean, **style | {"markersize": 3})
    plot.fill_between(mean.index, mean - half, mean + half, color=style["color"], alpha=0.2, lw=0)


def _draw_points(
    plot: Axes,
    rows: pd.DataFrame,
    figure: Figure,
    values: Sequence,
    shift: float,
    style: dict[str, Any],
) -> None:
    """Draws mean and interval at each value of an axis, and how many seeds did not finish."""
    x = np.arange(len(values)) + shift
    points = [_at(rows, figure.x, value) for value in values]
    per_seed = [
        in_percent(finished(point, figure.y, figure.over_steps), figure.y) for point in points
    ]
    mean = [seeds.mean() for seeds in per_seed]
    half = np.nan_to_num([interval(seeds) for seeds in per_seed])
    plot.errorbar(x, mean, yerr=half, capsize=3, **style)
    for at, level, point in zip(x, mean, points, strict=True):
        if lost := len(unfinished(point)):
            plot.annotate(
                f"{lost} lost",
                (at, plot.get_ylim()[0] if np.isnan(level) else level),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=style["color"],
            )
    plot.set_xticks(np.arange(len(values)), [_shown(value) for value in values])
    if max(len(str(value)) for value in values) * len(values) > 60:
        plot.tick_params(axis="x", rotation=30)


def _scale_y(plot: Axes, figure: Figure) -> None:
    """Sets the scale of y, with plain numbers; a linear one starts at 0 unless that hides all."""
    if figure.log_y:
        plot.set_yscale("log")
        low, high = plot.get_ylim()
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        plot.yaxis.set_major_formatter(plain)
        plot.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    elif plot.get_ylim()[0] < plot.get_ylim()[1] / 2:
        plot.set_ylim(bottom=0)


def _add_legend(canvas: Canvas, plot: Axes, axis: str) -> None:
    options: dict[str, Any] = {
        "title": _shown(axis_label(axis)),
        "fontsize": 8,
        "title_fontsize": 8,
    }
    handles, labels = plot.get_legend_handles_labels()
    if len(handles) > LINES_BESIDE_A_LEGEND:
        canvas.legend(handles, labels, loc="outside right upper", **options)
    else:
        plot.legend(handles, labels, **options)


def caption(figure: Figure) -> str:
    """Returns what a figure shows, in sentences."""
    plain = f"{metric_label(figure.y)} against {axis_label(figure.x)}"
    parts = [figure.title or sentence(plain)]
    if figure.fixed:
        fixed = ", ".join(f"{axis_label(axis)} {value}" for axis, value in figure.fixed.items())
        parts.append(f"At {fixed}")
    if figure.x != "step" and figure.over_steps == "mean":
        parts.append("Averaged over the evaluations of each run")
    kind = "Bands" if figure.x == "step" else "Bars"
    parts.append(
        f"{kind}: {CONFIDENCE:.0%} confidence interval of the mean over seeds; runs that diverged "
        "or failed are left out" + ("" if figure.x == "step" else " and counted as lost")
    )
    return ". ".join(parts) + "."
