"""What an experiment file declares: axes, seeds, a baseline and the figures of the report."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.training.config_files import check_field, with_fields

RESERVED = ("seed", "step", "last", "outcome", "reason", "end_step", "seconds")
"""Columns of the results that every sweep has; no axis can have their names."""

OVER_STEPS = ("last", "mean")

Axis = Sequence[Any] | Mapping[Any, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the report: the mean over seeds with its 95 % interval.

    Every axis of the sweep must have its place: on x, as a line, as a panel, or fixed.

    Attributes:
      y: what was measured, 'test_error' for example, or 'seconds' of each run.
      x: 'step', for curves, or an axis.
      lines: an axis; a line for each of its values.
      panels: an axis; a panel for each of its values.
      fixed: axes and the value that is shown.
      over_steps: with x an axis, the 'last' evaluation of a run or the 'mean' over all.
      log_y: whether y has a logarithmic scale.
      title: the caption's first sentence; default: y against x.
    """

    y: str = "test_error"
    x: str = "step"
    lines: str | None = None
    panels: str | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    over_steps: str = "last"
    log_y: bool = False
    title: str = ""

    def __post_init__(self):
        object.__setattr__(self, "fixed", _as_python(self.fixed))

    @property
    def axes(self) -> set[str]:
        """The axes that have a place in the figure."""
        placed = (self.x, self.lines, self.panels, *self.fixed)
        return {axis for axis in placed if axis not in (None, "step")}


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      point: the value, or the name of the variant, on each axis.
      seed: the run's seed.
      fields: the config fields that the axes and the seed set.
    """

    point: Mapping[str, Any]
    seed: int
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The point and the seed as JSON; no two members of a sweep share it."""
        return json.dumps({**self.point, "seed": self.seed})

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        parts = [f"{axis.split('.')[-1]}={value}" for axis, value in self.point.items()]
        readable = ",".join([*parts, f"seed={self.seed}"])
        folder = re.sub(r"[^\w.=,+-]+", "_", readable)[:150]
        if folder == readable:
            return folder
        return f"{folder},{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    def config(self, base: ConfigDict) -> ConfigDict:
        """Returns the member's configuration, made from the one that all members share."""
        return with_fields(base, self.fields, self.name)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid of runs, each point with several seeds.

    Attributes:
      title: the report's title.
      configs: a config file for each data set that the experiment has settings for, by
        `dataset.name`; paths are relative to the experiment file. The first is the default; a data
        set without a file takes it too.
      axes: by name. An axis named like a config field has the field's values, as a sequence or an
        array. Any other has named variants, each a dict of the fields that it sets.
      text: what the sweep is about, for the report.
      seeds: how many, from 0.
      fields: config fields to change for all members.
      baseline: a value on each axis (on some, for a baseline at each value of the others); the
        report compares with it, seed by seed.
      metrics: what the tables of the report show.
      over_steps: which value of a run they show: the 'last' one, or the 'mean' over the run.
      figures: the report's figures.

    Raises:
      UserError: for axes, a baseline or figures that do not fit together.

    >>> sweep = Sweep(
    ...     title='Memory size',
    ...     configs={'digits': 'configs/digits.py'},
    ...     axes={'norm.memory_size': (1, 8)},
    ...     seeds=3,
    ...     figures=[Figure(x='norm.memory_size')],
    ... )
    >>> [dict(member.fields) for member in sweep.members()][-1]
    {'norm.memory_size': 8, 'seed': 2}
    """

    title: str
    configs: Mapping[str, str]
    axes: Mapping[str, Axis]
    text: str = ""
    seeds: int = 5
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    baseline: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Sequence[str] = ("test_error",)
    over_steps: str = "last"
    figures: Sequence[Figure] = ()

    def __post_init__(self):
        axes = {name: _axis_values(name, values) for name, values in self.axes.items()}
        object.__setattr__(self, "axes", axes)
        for name in ("seeds", "fields", "baseline"):
            object.__setattr__(self, name, _as_python(getattr(self, name)))
        for check in CHECKS:
            check(self)

    def members(self) -> list[Member]:
        """Returns all runs; the first seed of every point comes first."""
        points = [
            dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        ]
        fields = [self._fields_at(point) for point in points]
        return [
            Member(point, seed, {**changes, "seed": seed})
            for seed in range(self.seeds)
            for point, changes in zip(points, fields, strict=True)
        ]

    def _fields_at(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields that the axes set at a point."""
        fields: dict[str, Any] = {}
        for axis, value in point.items():
            values = self.axes[axis]
            changes = values[value] if isinstance(values, Mapping) else {axis: value}
            twice = sorted(set(changes) & set(fields))
            if twice:
                raise UserError(f"two axes set the field {twice[0]}; leave it to one of them")
            fields |= changes
        return fields

    def base_config(self, config: ConfigDict) -> ConfigDict:
        """Returns the config that all members share: this one with the sweep's own changes."""
        for field in [*self.fields, *self.swept_fields]:
            check_field(config, field)
        return with_fields(config, self.fields, "the sweep's fields")

    @property
    def swept_fields(self) -> list[str]:
        """The fields in which members may differ, apart from the seed."""
        named = {field: None for member in self.members() for field in member.fields}
        return [field for field in named if field != "seed"]


def _as_python(value: Any) -> Any:
    """Returns a value with the numbers and arrays of numpy and JAX as Python has them.

    >>> import numpy as np
    >>> _as_python({np.int64(4): np.float64(0.5), 'rates': np.logspace(-2, -1, 2)})
    {4: 0.5, 'rates': [0.01, 0.1]}
    """
    if isinstance(value, Mapping):
        return {_as_python(key): _as_python(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_as_python, value))
    return value.tolist() if hasattr(value, "tolist") else value


def _axis_values(axis: str, values: Any) -> Axis:
    """Returns an axis' named variants as a dict, its values as a tuple; raises UserError."""
    values = _as_python(values)
    if isinstance(values, Mapping):
        return values
    if isinstance(values, str | set | frozenset) or not isinstance(values, Iterable):
        raise UserError(
            f"axis {axis!r} must have a tuple, a list or an array of values, or a dict of named "
            f"variants; got {values!r}"
        )
    return tuple(map(_as_python, values))


def _check_size(sweep: Sweep) -> None:
    if not sweep.configs or not sweep.axes:
        raise UserError("a sweep needs configs and axes, got none")
    if not isinstance(sweep.seeds, int) or sweep.seeds < 1:
        raise UserError(f"a sweep needs 1 seed or more, got {sweep.seeds}")


def _check_names(sweep: Sweep) -> None:
    for axis, values in sweep.axes.items():
        if not isinstance(axis, str) or not axis or axis in RESERVED or not values:
            reserved = " (a column that all results have)" if axis in RESERVED else ""
            raise UserError(
                f"a sweep cannot have the axis {axis!r}{reserved} with {len(values)} values"
            )


def _check_values(sweep: Sweep) -> None:
    for axis, values in sweep.axes.items():
        variants = list(values.values()) if isinstance(values, Mapping) else []
        wrong = [v for v in variants if not isinstance(v, Mapping)]
        wrong += [v for v in values if not isinstance(v, str | bool | int | float)]
        if wrong:
            raise UserError(
                f"axis {axis!r} must be numbers, texts and booleans, or named variants, each a "
                f"dict of fields; got {wrong[0]!r} of {type(wrong[0]).__name__}"
            )
        infinite = [v for v in values if isinstance(v, float) and not math.isfinite(v)]
        if infinite:
            raise UserError(f"axis {axis!r} must have finite values, got {infinite[0]}")
        # 1, 1.0 and True are one value to a config, "1" and 1 are one to the reader of a table.
        if len(set(values)) < len(values) or len(set(map(str, values))) < len(values):
            raise UserError(
                f"axis {axis!r} has a value twice: {list(values)} (1, 1.0, True and '1' count as "
                "one)"
            )


def _check_seed_is_free(sweep: Sweep) -> None:
    variants = [v for a in sweep.axes.values() if isinstance(a, Mapping) for v in a.values()]
    if any("seed" in fields for fields in (sweep.fields, *variants)):
        raise UserError("the sweep's seeds set the field seed; leave it out of fields and variants")


def _check_points(sweep: Sweep) -> None:
    points = [("baseline", sweep.baseline), *(("figure", f.fixed) for f in sweep.figures)]
    for what, point in points:
        for axis, value in point.items():
            if axis not in sweep.axes or value not in sweep.axes[axis]:
                raise UserError(f"{what}: {value!r} is not on an axis {axis!r} of the sweep")


def _check_over_steps(sweep: Sweep) -> None:
    for over_steps in (sweep.over_steps, *(figure.over_steps for figure in sweep.figures)):
        if over_steps not in OVER_STEPS:
            raise UserError(f"over_steps must be 'last' or 'mean', got {over_steps!r}")


def _check_places(sweep: Sweep) -> None:
    with_choice = {axis for axis, values in sweep.axes.items() if len(values) > 1}
    for figure in sweep.figures:
        if figure.axes - set(sweep.axes) or with_choice - figure.axes:
            raise UserError(
                f"the figure of {figure.y!r} must give each axis of {sorted(sweep.axes)} a "
                f"place (x, lines, panels or fixed), and has {sorted(figure.axes)}"
            )


CHECKS = (
    _check_size,
    _check_names,
    _check_values,
    _check_seed_is_free,
    _check_points,
    _check_over_steps,
    _check_places,
)
"""What a declaration must pass, in this order; each raises UserError."""
