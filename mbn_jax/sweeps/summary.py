"""Statistics over the seeds of a sweep: means, intervals, differences from the baseline."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.results import AXIS, RUN, VALUE

CONFIDENCE = 0.95


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


def measured(results: pd.DataFrame, metric: str) -> pd.Series:
    """Returns the column of a metric: of a recorded value or, where none is called so, of the runs.

    It is empty (nan) where nothing has measured the metric yet.
    """
    for column in ((VALUE, metric), (RUN, metric)):
        if column in results:
            return results[column]
    return pd.Series(np.nan, results.index)


def last_rows(results: pd.DataFrame) -> pd.DataFrame:
    """Returns one row a member: its last."""
    return results[results[RUN, "last"]]


def unfinished(results: pd.DataFrame) -> pd.DataFrame:
    """Returns one row a member that diverged or failed."""
    rows = last_rows(results)
    return rows[rows[RUN, "outcome"].isin([store.DIVERGED, store.FAILED])]


def finished(rows: pd.DataFrame, metric: str, over_steps: str = "last") -> pd.Series:
    """Returns a metric of the runs that finished, by seed: its 'last' value or its 'mean'."""
    values = measured(rows, metric)[rows[RUN, "outcome"] == store.FINISHED].dropna()
    return values.groupby(rows[RUN, "seed"]).agg(over_steps)


def summarize(
    results: pd.DataFrame,
    axes: Mapping[str, Sequence],
    metric: str,
    baseline: Mapping[str, Any],
    over_steps: str = "last",
) -> pd.DataFrame:
    """Summarizes a metric at each point, over the seeds.

    Args:
      results: from `read_results`.
      axes: name of each axis and its values, in order.
      metric: as for `measured`.
      baseline: value on each axis, or on some: then each point is compared with the one that
        differs from it in these alone.
      over_steps: as for `finished`.

    Returns:
      A row a point that has members, indexed by the values on the axes. 'mean', 'interval' (half
      width, 95 %), 'standard_deviation' and 'seeds' are of the runs that finished; 'diverged' and
      'failed' count the others. With a baseline, 'difference' and 'difference_interval' are paired
      by seed over the 'pairs' that finished in both.
    """
    groups = dict(list(results.groupby([(AXIS, name) for name in axes], sort=False)))
    values = {point: finished(rows, metric, over_steps) for point, rows in groups.items()}
    points = [point for point in itertools.product(*axes.values()) if point in groups]
    summaries = []
    for point in points:
        outcomes = last_rows(groups[point])[RUN, "outcome"]
        summary = {
            "mean": values[point].mean(),
            "interval": interval(values[point]),
            "standard_deviation": values[point].std(),
            "seeds": len(values[point]),
        }
        summary |= {kind: (outcomes == kind).sum() for kind in (store.DIVERGED, store.FAILED)}
        compared_with = tuple(
            baseline.get(name, value) for name, value in zip(axes, point, strict=True)
        )
        if compared_with != point:
            pairs = (values[point] - values.get(compared_with, np.nan)).dropna()
            summary |= {
                "difference": pairs.mean(),
                "difference_interval": interval(pairs),
                "pairs": len(pairs),
            }
        summaries.append(summary)
    return pd.DataFrame(summaries, index=pd.MultiIndex.from_tuples(points, names=list(axes)))
