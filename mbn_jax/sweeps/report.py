"""The report of a sweep: one HTML page that stands alone, figures as PNG, tables as Markdown."""

import base64
import html
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.results import (
    CONFIDENCE,
    finished,
    interval,
    members,
    summarize,
)
from mbn_jax.training.workdir import replace

HTML = "report.html"
MARKDOWN = "report.md"
FIGURES = "figures"

# Okabe and Ito's colours, told apart by colour-blind readers; markers and dashes for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":")
LINES_BESIDE_A_LEGEND = 4  # With more, the legend would cover them.
PERCENT = ("test_error", "train_error", "recalibrated_test_error")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
       max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
figure { margin: 1.5rem 0; break-inside: avoid; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #333; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #ccc; }
th { border-bottom: 2px solid #111; } td.text { text-align: left; }
pre { overflow-x: auto; background: #f4f4f4; padding: .7rem; font-size: .85rem; }
code { overflow-wrap: anywhere; }
@media print { body { max-width: none; font-size: 11pt; } pre { white-space: pre-wrap; } }
"""


def write_report(study: optuna.Study, results: pd.DataFrame, workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html`, `report.md` and `figures/`.

    Args:
      study: of the sweep.
      results: of `read_results`.
      workdir: where to.

    Returns:
      The path of `report.html`.
    """
    sweep = study.user_attrs[store.SWEEP]
    blocks: list[tuple[str, Any]] = [("heading", sweep["title"])]
    if sweep["text"]:
        blocks.append(("text", sweep["text"]))
    blocks.append(("text", _setting(study, results)))
    (workdir / FIGURES).mkdir(exist_ok=True)
    for number, figure in enumerate(sweep["figures"], start=1):
        if not _is_measured(figure["y"], results):
            blocks.append(("text", f"No figure of {figure['y']}: nothing has measured it yet."))
            continue
        name = f"{FIGURES}/{number}_{figure['y'].replace('/', '_')}.png"
        png = draw(figure, results, sweep["axes"])
        replace(workdir / name, png)
        blocks.append(("figure", (name, png, _caption(figure))))
    what = {"last": "the last that was measured", "mean": "averaged over each run"}
    over_steps, baseline = sweep["over_steps"], sweep["baseline"]
    for metric in sweep["metrics"]:
        blocks.append(("section", f"{_sentence(_label(metric))}, {what[over_steps]}"))
        if not _is_measured(metric, results):
            blocks.append(("text", "Nothing has measured it yet."))
            continue
        table = summarize(results, sweep["axes"], metric, baseline, over_steps)
        blocks.append(("table", _format(table, sweep["axes"], metric)))
        blocks.append(("text", _table_note(sweep)))
    ended = members(results)
    ended = ended[ended["outcome"].isin([store.DIVERGED, store.FAILED])]
    if len(ended):
        blocks.append(("section", "Members that did not finish"))
        shown = ended[[*sweep["axes"], "seed", "outcome", "end_step", "reason"]]
        blocks.append(("table", shown.astype({"end_step": "Int64"}).astype(str)))
    blocks += [("section", "Cost"), ("table", _cost(study, results))]
    blocks += [("section", "How to repeat it"), ("code", sweep["command"])]
    versions = ", ".join(f"{name} {version}" for name, version in sweep["versions"].items())
    blocks.append(("text", f"{versions}; on {sweep['device']}."))
    blocks.append(("details", ("Axes", json.dumps(sweep["axes"], indent=1))))
    config = json.dumps(study.user_attrs[store.CONFIG], indent=1)
    blocks.append(("details", ("The config that all members share", config)))
    replace(workdir / MARKDOWN, _markdown(blocks).encode())
    replace(workdir / HTML, _html(blocks).encode())
    return workdir / HTML


def _is_measured(column: str, results: pd.DataFrame) -> bool:
    return column in results and bool(results[column].notna().any())


def draw(
    figure: Mapping[str, Any],
    results: pd.DataFrame,
    axes: Mapping[str, Sequence],
) -> bytes:
    """Draws one figure: means over seeds, with their 95 % intervals as bands or bars.

    Args:
      figure: the fields of a `mbn_jax.sweeps.Figure`.
      results: of `read_results`.
      axes: name of each axis and its values, in order.

    Returns:
      The PNG.
    """
    rows, y = results, figure["y"]
    for axis, value in figure["fixed"].items():
        rows = rows[rows[axis] == value]
    panels = axes[figure["panels"]] if figure["panels"] else [None]
    lines = axes[figure["lines"]] if figure["lines"] else [None]
    # Such as group normalization's, which has no statistics.
    empty = [
        x for x in lines if x is not None and rows.loc[rows[figure["lines"]] == x, y].isna().all()
    ]
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    height = -(-len(panels) // columns)
    size = (max(6.4, 3.6 * columns), 3.8 * height + 0.4)
    canvas = Canvas(figsize=size, layout="constrained")
    # Runs of one panel may be longer than those of another.
    shares_x = figure["x"] != "step"
    grid = canvas.subplots(height, columns, squeeze=False, sharex=shares_x, sharey=True)
    for unused in grid.flat[len(panels) :]:
        unused.set_visible(False)
    for panel, plot in zip(panels, grid.flat, strict=False):
        part = rows if panel is None else rows[rows[figure["panels"]] == panel]
        for i, line in enumerate(lines):
            selected = part if line is None else part[part[figure["lines"]] == line]
            if line in empty:
                continue
            style = {
                "color": COLORS[i % len(COLORS)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": DASHES[i % len(DASHES)],
                "markersize": 4,
                "label": str(line),
            }
            if figure["x"] == "step":
                _draw_curve(plot, selected, figure["y"], style)
            else:
                shift = (i - (len(lines) - 1) / 2) * 0.06
                _draw_points(plot, selected, figure, axes[figure["x"]], shift, style)
        if panel is not None:
            plot.set_title(f"{_label(figure['panels'])} {panel}", fontsize=10)
        plot.set(xlabel=_label(figure["x"]), ylabel=_label(figure["y"]))
        if shares_x:
            plot.label_outer()
        if figure["log_y"]:
            plot.set_yscale("log")
            low, high = plot.get_ylim()
            plain = FuncFormatter(lambda value, _: f"{value:g}")
            plot.yaxis.set_major_formatter(plain)
            plot.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
        elif plot.get_ylim()[0] < plot.get_ylim()[1] / 2:  # From 0, but where that hides all.
            plot.set_ylim(bottom=0)
        plot.grid(alpha=0.3)
    if figure["lines"]:
        options = {"title": _label(figure["lines"]), "fontsize": 8, "title_fontsize": 8}
        if len(lines) > LINES_BESIDE_A_LEGEND:
            handles = grid.flat[0].get_legend_handles_labels()
            canvas.legend(*handles, loc="outside right upper", **options)
        else:
            grid.flat[0].legend(**options)
    content = io.BytesIO()
    canvas.savefig(content, format="png", dpi=160)
    return content.getvalue()


def _draw_curve(plot: Axes, rows: pd.DataFrame, y: str, style: dict) -> None:
    rows = rows[(rows["outcome"] == store.FINISHED) & rows[y].notna()]
    by_step = _scaled(rows[y]).groupby(rows["step"])
    mean, half = by_step.mean(), by_step.agg(interval).fillna(0)
    plot.plot(mean.index, mean, **style | {"markersize": 3})
    plot.fill_between(mean.index, mean - half, mean + half, color=style["color"], alpha=0.2, lw=0)


def _draw_points(
    plot: Axes,
    rows: pd.DataFrame,
    figure: Mapping[str, Any],
    values: Sequence,
    shift: float,
    style: dict,
) -> None:
    """Draws mean and interval at each value of an axis, and how many seeds did not finish."""
    x = np.arange(len(values)) + shift
    mean, half, lost = [], [], []
    for value in values:
        point = rows[rows[figure["x"]] == value]
        per_seed = _scaled(finished(point, figure["y"], figure["over_steps"]))
        ended = members(point)["outcome"].isin([store.DIVERGED, store.FAILED]).sum()
        mean.append(per_seed.mean())
        half.append(interval(per_seed))
        lost.append(ended)
    plot.errorbar(x, mean, yerr=np.nan_to_num(half), capsize=3, **style)
    for at, level, count in zip(x, mean, lost, strict=True):
        if count:
            plot.annotate(
                f"{count} lost",
                (at, plot.get_ylim()[0] if np.isnan(level) else level),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=style["color"],
            )
    plot.set_xticks(np.arange(len(values)), [str(value) for value in values])
    if max(len(str(value)) for value in values) * len(values) > 60:
        plot.tick_params(axis="x", rotation=30)


def _scaled(column: pd.Series) -> pd.Series:
    """Returns a column with fractions as percent."""
    return column * 100 if column.name in PERCENT else column


def _label(name: str) -> str:
    """Returns a column's name for people.

    >>> _label('norm.memory_size'), _label('norm.name'), _label('test_error')
    ('memory size', 'norm', 'test error (%)')
    """
    text = name.removesuffix(".name").split(".")[-1].replace("_", " ")
    return f"{text} (%)" if name in PERCENT else text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _caption(figure: Mapping[str, Any]) -> str:
    plain = f"{_label(figure['y'])} against {_label(figure['x'])}"
    parts = [figure["title"] or _sentence(plain)]
    if figure["fixed"]:
        fixed = ", ".join(f"{_label(axis)} {value}" for axis, value in figure["fixed"].items())
        parts.append(f"At {fixed}")
    if figure["x"] != "step" and figure["over_steps"] == "mean":
        parts.append("Averaged over the evaluations of each run")
    kind = "Bands" if figure["x"] == "step" else "Bars"
    parts.append(
        f"{kind}: {CONFIDENCE:.0%} confidence interval of the mean over seeds; runs that diverged "
        "or failed are left out" + ("" if figure["x"] == "step" else " and counted as lost")
    )
    return ". ".join(parts) + "."


def _setting(study: optuna.Study, results: pd.DataFrame) -> str:
    config, sweep = study.user_attrs[store.CONFIG], study.user_attrs[store.SWEEP]
    outcomes = members(results)["outcome"].value_counts()
    told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    shown = {
        "dataset.name": "data set",
        "model.name": "network",
        "norm.name": "norm",
        "batch_size": "batch size",
        "num_epochs": "epochs",
        "optimizer.learning_rate": "learning rate",
    }
    shared = [field for field in shown if field not in sweep["fields"]]
    setting = ", ".join(f"{shown[field]} {config[field]}" for field in shared)
    return f"{_sentence(setting)}; seeds: {sweep['seeds']}. Members: {told}."


def _table_note(sweep: Mapping[str, Any]) -> str:
    note = (
        f"Mean over the seeds that finished, ± half of the {CONFIDENCE:.0%} confidence interval "
        "(Student's t), and standard deviation."
    )
    if sweep["baseline"]:
        baseline = ", ".join(f"{_label(k)} {v}" for k, v in sweep["baseline"].items())
        note += f" Difference: from {baseline}, seed by seed, with its interval."
    return note


def _format(table: pd.DataFrame, axes: Mapping[str, Sequence], metric: str) -> pd.DataFrame:
    """Returns the summary as text, fractions as percent."""
    scale, digits = (100, 2) if metric in PERCENT else (1, 4)

    def spread(value: float, half: float) -> str:
        if pd.isna(value):
            return "-"
        half_text = "" if pd.isna(half) else f" ± {scale * half:.{digits}f}"
        return f"{scale * value:.{digits}f}{half_text}"

    text = table[list(axes)].astype(str).rename(columns=_label)
    text[_label(metric)] = list(map(spread, table["mean"], table["interval"]))
    text["std"] = [
        "-" if pd.isna(s) else f"{scale * s:.{digits}f}" for s in table["standard_deviation"]
    ]
    for column in ("seeds", store.DIVERGED, store.FAILED):
        text[column] = table[column].astype(str)
    if "difference" in table:
        text["difference"] = list(map(spread, table["difference"], table["difference_interval"]))
        text["pairs"] = ["-" if pd.isna(n) else f"{n:.0f}" for n in table["pairs"]]
    return text


def _cost(study: optuna.Study, results: pd.DataFrame) -> pd.DataFrame:
    costs = [
        trial.user_attrs[store.COST]
        for trial in store.trials_by_member(study).values()
        if store.COST in trial.user_attrs
    ]
    seconds = [cost["seconds"] for cost in costs]
    rate = results["images_per_second"].median() if "images_per_second" in results else np.nan
    median = np.median(seconds) if seconds else np.nan
    cells = {
        "members run": len(costs),
        "seconds a member (median, since its last start)": f"{median:.1f}",
        "seconds in all of these": f"{sum(seconds):.0f}",
        "images/s a member (median)": f"{rate:,.0f}",
        "compilations of the step": sum(cost["step_compilations"] for cost in costs),
        "peak memory, MiB": f"{max((c['peak_bytes'] for c in costs), default=0) / 2**20:.0f}",
    }
    return pd.DataFrame({"what": list(cells), "value": list(map(str, cells.values()))})


def _markdown(blocks: Sequence[tuple[str, Any]]) -> str:
    """Returns the report as Markdown, with links to the figures."""
    parts = []
    for kind, content in blocks:
        if kind == "heading":
            parts.append(f"# {content}")
        elif kind == "section":
            parts.append(f"## {content}")
        elif kind == "text":
            parts.append(content)
        elif kind == "code":
            parts.append(f"    {content}")
        elif kind == "figure":
            name, _, caption = content
            parts.append(f"![{caption}]({name})\n\n*{caption}*")
        elif kind == "table":
            lines = [list(content.columns), ["---"] * content.shape[1], *content.values.tolist()]
            parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
        else:
            title, text = content
            parts.append(f"<details><summary>{title}</summary>\n\n```json\n{text}\n```\n</details>")
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _html(blocks: Sequence[tuple[str, Any]]) -> str:
    """Returns the report as a page that needs no other file."""
    title = html.escape(blocks[0][1])
    parts = []
    for kind, content in blocks:
        if kind == "heading":
            parts.append(f"<h1>{title}</h1>")
        elif kind == "section":
            parts.append(f"<h2>{html.escape(content)}</h2>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(content)}</p>")
        elif kind == "code":
            parts.append(f"<pre><code>{html.escape(content)}</code></pre>")
        elif kind == "figure":
            _, png, caption = content
            data = base64.b64encode(png).decode()
            caption = html.escape(caption)
            parts.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        elif kind == "table":
            parts.append(f'<div class="scroll">{_html_table(content)}</div>')
        else:
            name, text = map(html.escape, content)
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_table(table: pd.DataFrame) -> str:
    def row(cells: Sequence, tag: str) -> str:
        return f"<tr>{''.join(cell(str(text), tag) for text in cells)}</tr>"

    def cell(text: str, tag: str) -> str:
        is_text = tag == "td" and not re.match(r"-?[\d.]|-$|nan", text)
        return f"<{tag}{' class=text' if is_text else ''}>{html.escape(text)}</{tag}>"

    body = "\n".join(row(line, "td") for line in table.values.tolist())
    return f"<table><thead>{row(table.columns, 'th')}</thead>\n<tbody>{body}</tbody></table>"
