"""The report of a sweep: its setting, figures, tables, costs and how to repeat it."""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd

from mbn_jax.sweeps import page
from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.declaration import Figure
from mbn_jax.sweeps.figures import caption, draw
from mbn_jax.sweeps.labels import (
    axis_label,
    distinct_axis_labels,
    in_percent,
    metric_label,
    sentence,
)
from mbn_jax.sweeps.page import Block
from mbn_jax.sweeps.results import AXIS, RUN
from mbn_jax.sweeps.summary import CONFIDENCE, last_rows, measured, summarize, unfinished
from mbn_jax.training.workdir import replace

HTML = "report.html"
MARKDOWN = "report.md"
FIGURES = "figures"

SETTING = {
    "dataset.name": "data set",
    "model.name": "network",
    "norm.name": "norm",
    "batch_size": "batch size",
    "num_epochs": "epochs",
    "optimizer.learning_rate": "learning rate",
}
"""Fields that the report names first, where all members share them."""

OVER_STEPS = {"last": "the last that was measured", "mean": "averaged over each run"}


def write_report(study: optuna.Study, results: pd.DataFrame, workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html`, whose path is returned, `report.md` and `figures/`."""
    sweep = study.user_attrs[store.SWEEP]
    blocks: list[Block] = [page.text(sweep["text"])] if sweep["text"] else []
    blocks.append(page.text(_setting(study, results)))
    (workdir / FIGURES).mkdir(exist_ok=True)
    for number, figure in enumerate(sweep["figures"], start=1):
        blocks.append(_figure(number, Figure(**figure), results, sweep["axes"], workdir))
    for metric in sweep["metrics"]:
        blocks += _metric(metric, results, sweep)
    blocks += _lost_members(results, list(sweep["axes"]))
    blocks += [page.section("Cost"), page.table(_cost(study, results))]
    blocks += _how_to_repeat(study)
    pages = {MARKDOWN: page.markdown_page, HTML: page.html_page}
    for name, make in pages.items():
        replace(workdir / name, make(sweep["title"], blocks).encode(errors="backslashreplace"))
    return workdir / HTML


def _setting(study: optuna.Study, results: pd.DataFrame) -> str:
    """Returns what all members share and how they ended, in words."""
    config, sweep = study.user_attrs[store.CONFIG], study.user_attrs[store.SWEEP]
    shared = [field for field in SETTING if field not in sweep["fields"]]
    setting = ", ".join(f"{SETTING[field]} {config[field]}" for field in shared)
    outcomes = last_rows(results)[RUN, "outcome"].value_counts()
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return f"{sentence(setting)}; seeds: {sweep['seeds']}. Members: {counts}."


def _figure(
    number: int,
    figure: Figure,
    results: pd.DataFrame,
    axes: Mapping[str, Sequence],
    workdir: pathlib.Path,
) -> Block:
    """Draws a figure into its file too, where there is something to draw."""
    if measured(results, figure.y).isna().all():
        return page.text(f"No figure of {figure.y}: nothing has measured it yet.")
    file = re.sub(r"[^\w.=+-]+", "_", figure.y, flags=re.ASCII)
    path = f"{FIGURES}/{number}_{file}.png"
    png = draw(figure, results, axes)
    replace(workdir / path, png)
    return page.picture(path, png, caption(figure))


def _metric(metric: str, results: pd.DataFrame, sweep: Mapping[str, Any]) -> Iterator[Block]:
    """Yields the section with the table of a metric."""
    over_steps, baseline = sweep["over_steps"], sweep["baseline"]
    yield page.section(f"{sentence(metric_label(metric))}, {OVER_STEPS[over_steps]}")
    if measured(results, metric).isna().all():
        yield page.text("Nothing has measured it yet.")
        return
    summary = summarize(results, sweep["axes"], metric, baseline, over_steps)
    yield page.table(_summary_as_text(summary, metric))
    note = (
        f"Mean over the seeds that finished, ± half of the {CONFIDENCE:.0%} confidence interval "
        "(Student's t), and standard deviation."
    )
    if baseline:
        point = ", ".join(f"{axis_label(axis)} {value}" for axis, value in baseline.items())
        note += f" Difference: from {point}, seed by seed, with its interval."
    yield page.text(note)


def _summary_as_text(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns a table of `summarize` as the texts to show, fractions in percent."""
    digits = 2 if in_percent(1.0, metric) == 100 else 4

    def number(value: float) -> str:
        return f"{in_percent(value, metric):z.{digits}f}"  # z: no minus before 0.00.

    def spread(value: float, half: float) -> str:
        if pd.isna(value):
            return "-"
        return number(value) if pd.isna(half) else f"{number(value)} ± {number(half)}"

    columns = {
        metric_label(metric): list(map(spread, summary["mean"], summary["interval"])),
        "std": ["-" if pd.isna(std) else number(std) for std in summary["standard_deviation"]],
    }
    for count in ("seeds", store.DIVERGED, store.FAILED):
        columns[count] = [str(number) for number in summary[count]]
    if "difference" in summary:
        differences = map(spread, summary["difference"], summary["difference_interval"])
        columns["difference"] = list(differences)
        columns["pairs"] = ["-" if pd.isna(count) else f"{count:.0f}" for count in summary["pairs"]]
    labels = distinct_axis_labels(summary.index.names, list(columns))
    points = zip(*summary.index, strict=True)
    axes = {label: map(str, values) for label, values in zip(labels, points, strict=True)}
    return pd.DataFrame({name: list(values) for name, values in {**axes, **columns}.items()})


def _lost_members(results: pd.DataFrame, axes: Sequence[str]) -> Iterator[Block]:
    """Yields the section that says why members did not finish, if any did not."""
    rows = unfinished(results)
    if rows.empty:
        return
    yield page.section("Members that did not finish")
    columns = ["seed", "outcome", "end_step", "reason"]
    shown = rows[[*((AXIS, axis) for axis in axes), *((RUN, column) for column in columns)]]
    shown = shown.astype({(RUN, "end_step"): "Int64"}).astype(str)
    yield page.table(
        shown.set_axis([*distinct_axis_labels(axes, columns), *columns], axis=1), is_text=True
    )


def _cost(study: optuna.Study, results: pd.DataFrame) -> pd.DataFrame:
    """Returns a table of what the members cost that have run."""
    costs = [
        trial.user_attrs[store.COST]
        for trial in store.trials_by_member(study).values()
        if store.COST in trial.user_attrs
    ]
    seconds = [cost["seconds"] for cost in costs]
    median = np.median(seconds) if seconds else np.nan
    cells = {
        "members run": len(costs),
        "seconds a member (median, over all its attempts)": f"{median:.1f}",
        "seconds in all of these": f"{sum(seconds):.0f}",
        "images/s a member (median)": f"{measured(results, 'images_per_second').median():,.0f}",
        "compilations of the step": sum(cost["step_compilations"] for cost in costs),
        "peak memory, MiB": f"{max((c['peak_bytes'] for c in costs), default=0) / 2**20:.0f}",
    }
    return pd.DataFrame({"what": list(cells), "value": list(map(str, cells.values()))})


def _how_to_repeat(study: optuna.Study) -> list[Block]:
    """Returns the section with command, versions, axes and config."""
    sweep = study.user_attrs[store.SWEEP]
    versions = ", ".join(f"{name} {version}" for name, version in sweep["versions"].items())
    config = json.dumps(study.user_attrs[store.CONFIG], indent=1)
    return [
        page.section("How to repeat it"),
        page.command(sweep["command"]),
        page.text(f"{versions}; on {sweep['device']}."),
        page.details("Axes", json.dumps(sweep["axes"], indent=1)),
        page.details("The config that all members share", config),
    ]
