"""The results of a sweep: one table, in memory and as `results.csv` and `results.parquet`.

In memory a column is a pair, its group and its name, so that an axis called `learning_rate` and the
learning rate that a run recorded are two columns. The files have one name a column.
"""

import io
import json
import pathlib
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from mbn_jax.sweeps import storage as store
from mbn_jax.training.workdir import replace

CSV = "results.csv"
PARQUET = "results.parquet"

RUN = "run"
"""What every sweep has, `mbn_jax.sweeps.declaration.RESERVED`."""

AXIS = "axis"
FIELD = "field"
"""Config fields that the named variants of an axis set."""

VALUE = "value"
"""What the runs recorded: losses, errors, the metrics of a user."""

ORDER = (AXIS, FIELD, RUN, VALUE)
PRECEDENCE = (RUN, AXIS, FIELD, VALUE)
"""Of two columns with one name, the later one's gets its group in front in the files."""


def read_results(study: optuna.Study) -> pd.DataFrame:
    """Reads the results of a sweep.

    Returns:
      One row a member and evaluation, oldest first, and one row without values for a member that
      has none. Its columns are pairs: 'axis' and the name of each axis; 'field' and each swept
      field, where no axis has the same values under that name; 'run' and 'seed', 'outcome'
      ('finished', 'diverged', 'failed', 'running', 'waiting'), 'reason' and 'end_step' of what did
      not finish, 'seconds' of all attempts at it, 'last' (whether the row is the member's last) and
      'step'; 'value' and the name of each recorded value.
    """
    rows = []
    for name, trial in store.trials_by_member(study).items():
        member = _columns_of_member(study, name, trial)
        records = trial.user_attrs.get(store.RECORDS) or [{}]
        for number, record in enumerate(records, start=1):
            row = {**member, (RUN, "last"): number == len(records), (RUN, "step"): None}
            for key, value in record.items():
                row[(RUN, key) if key == "step" else (VALUE, key)] = value
            rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns.sort(key=lambda column: ORDER.index(column[0]))
    cells = [[row.get(column) for column in columns] for row in rows]
    results = pd.DataFrame(cells, columns=pd.MultiIndex.from_tuples(columns))
    named_twice = [
        (FIELD, name)
        for group, name in columns
        if group == AXIS
        and (FIELD, name) in columns
        and (results[AXIS, name] == results[FIELD, name]).all()
    ]
    return results.drop(columns=named_twice)


def _columns_of_member(study: optuna.Study, name: str, trial: FrozenTrial) -> dict[tuple, Any]:
    """Returns what all rows of a member share."""
    base, swept = study.user_attrs[store.CONFIG], study.user_attrs[store.SWEEP]["fields"]
    point, attributes = json.loads(name), trial.user_attrs
    seed = point.pop("seed")
    # A field of kwargs may be missing from what all members share.
    fields = {field: attributes[store.FIELDS].get(field, base.get(field)) for field in swept}
    run = {
        "seed": seed,
        "outcome": store.outcome(trial),
        "reason": attributes.get(store.REASON),
        "end_step": attributes.get(store.STEP),
        "seconds": attributes.get(store.COST, {}).get("seconds"),
    }
    groups = {AXIS: point, FIELD: fields, RUN: run}
    return {(group, key): value for group, row in groups.items() for key, value in row.items()}


def tidy(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the results with one name a column.

    It is the plain name where that is free. Else the group comes first: the recorded rate beside an
    axis `learning_rate` is `value:learning_rate`.
    """
    names: dict[tuple[str, str], str] = {}
    for group, plain in sorted(results.columns, key=lambda c: PRECEDENCE.index(c[0])):
        name = plain
        while name in names.values():
            name = f"{group}:{name}"
        names[group, plain] = name
    return results.set_axis([names[column] for column in results.columns], axis=1)


def write_results(results: pd.DataFrame, workdir: pathlib.Path) -> None:
    """Writes `results.csv` and `results.parquet`, as `tidy` names the columns."""
    table = tidy(results)
    replace(workdir / CSV, table.to_csv(index=False).encode())
    # A column of Parquet has one type: True beside 0.9 becomes text.
    mixed = [c for c in table if table[c].dropna().map(type).nunique() > 1]
    content = io.BytesIO()
    table.astype(dict.fromkeys(mixed, str)).to_parquet(content, index=False)
    replace(workdir / PARQUET, content.getvalue())
