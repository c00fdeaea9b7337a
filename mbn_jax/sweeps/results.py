"""The results of a sweep: one tidy table, and the statistics that a report shows of it."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
import pandas as pd
import scipy.stats

from mbn_jax.sweeps import storage as store
from mbn_jax.training.workdir import replace

CSV = "results.csv"
PARQUET = "results.parquet"
CONFIDENCE = 0.95


def read_results(study: optuna.Study) -> pd.DataFrame:
    """Reads the results of a sweep.

    Returns:
      One row a member and evaluation, oldest first, and a last one without values for a member that
      ended before its first: a column for each axis, each swept field and the seed; 'outcome'
      ('finished', 'diverged', 'failed', 'running', 'waiting'), 'reason' and 'end_step' of what did
      not finish; 'step', 'last' (whether it is the member's last), and the values; 'seconds' of the
      member's run.
    """
    base, swept = study.user_attrs[store.CONFIG], study.user_attrs[store.SWEEP]["fields"]
    rows = []
    for name, trial in store.trials_by_member(study).items():
        point = json.loads(name)
        changed = trial.user_attrs[store.FIELDS]
        fields = {field: changed.get(field, base[field]) for field in swept}
        member = {
            **{k: v for k, v in point.items() if k != "seed"},
            **fields,
            "seed": point["seed"],
            "outcome": store.outcome(trial),
            "reason": trial.user_attrs.get(store.REASON),
            "end_step": trial.user_attrs.get(store.STEP),
            "seconds": trial.user_attrs.get(store.COST, {}).get("seconds"),
        }
        records = trial.user_attrs.get(store.RECORDS) or [{}]
        for i, record in enumerate(records):
            rows.append({**member, "last": i == len(records) - 1, **record})
    return pd.DataFrame(rows)


def write_results(results: pd.DataFrame, workdir: pathlib.Path) -> None:
    """Writes `results.csv` and `results.parquet`."""
    replace(workdir / CSV, results.to_csv(index=False).encode())
    # A column of Parquet has one type: True beside 0.9 becomes text.
    mixed = [c for c in results if results[c].dropna().map(type).nunique() > 1]
    content = io.BytesIO()
    results.astype(dict.fromkeys(mixed, str)).to_parquet(content, index=False)
    replace(workdir / PARQUET, content.getvalue())


def interval(values: Sequence[float]) -> float:
    """Returns the half width of the 95 % confidence interval of the mean, by Student's t.

    >>> round(interval([1.0, 2.0, 3.0]), 3)
    2.484
    >>> interval([1.0])
    nan
    """
    if len(values) < 2:
        return float("nan")
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / np.sqrt(len(values)))


def members(results: pd.DataFrame) -> pd.DataFrame:
    """Returns one row a member: its last."""
    return results[results["last"]]


def finished(rows: pd.DataFrame, column: str, over_steps: str = "last") -> pd.Series:
    """Returns a column of the runs that finished, by seed.

    Args:
      rows: of the results, at one point of the sweep.
      column: of the results.
      over_steps: the 'last' value that was measured, or the 'mean' over all.
    """
    rows = rows[(rows["outcome"] == store.FINISHED) & rows[column].notna()]
    return rows.groupby("seed")[column].agg(over_steps)


def summarize(
    results: pd.DataFrame,
    axes: Mapping[str, Sequence],
    metric: str,
    baseline: Mapping,
    over_steps: str = "last",
) -> pd.DataFrame:
    """Summarizes a metric at each point, over the seeds.

    Args:
      results: of `read_results`.
      axes: name of each axis and its values, in order.
      metric: a column.
      baseline: value on each axis, or on some: then each point is compared with the one that
        differs from it in these alone.
      over_steps: as for `finished`.

    Returns:
      A row a point: the axes; 'mean' and 'interval' (half width, 95 %), 'standard_deviation' and
      'seeds' of the runs that finished; 'diverged' and 'failed'; 'difference' from the baseline and
      'difference_interval', paired by seed over 'pairs' that finished in both.
    """
    names = list(axes)
    rows = []
    for point, group in results.groupby(names, sort=False):
        ended = members(group)["outcome"]
        values = finished(group, metric, over_steps)
        row = dict(zip(names, point, strict=True))
        row |= {
            "mean": values.mean(),
            "interval": interval(values),
            "standard_deviation": values.std(),
            "seeds": len(values),
        }
        row |= {kind: (ended == kind).sum() for kind in (store.DIVERGED, store.FAILED)}
        other = {**row, **baseline}
        is_other = np.logical_and.reduce([results[axis] == other[axis] for axis in names])
        if baseline and any(row[axis] != other[axis] for axis in names):
            pairs = (values - finished(results[is_other], metric, over_steps)).dropna()
            row |= {
                "difference": pairs.mean(),
                "difference_interval": interval(pairs),
                "pairs": len(pairs),
            }
        rows.append(row)
    table = pd.DataFrame(rows)
    for axis, values in axes.items():
        table[axis] = pd.Categorical(table[axis], list(values), ordered=True)
    return table.sort_values(names).reset_index(drop=True)
