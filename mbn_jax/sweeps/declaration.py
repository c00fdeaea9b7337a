"""What an experiment file declares: axes, seeds, a baseline and the figures of the report."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.training.config_files import check_field, with_fields

RESERVED = ("seed", "step", "last", "outcome", "reason", "end_step", "seconds")
"""Columns of the results that no axis can be called."""

Axis = Sequence[Any] | Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the report: the mean over seeds with its 95 % interval.

    Every axis of the sweep must have its place: on x, as a line, as a panel, or fixed.

    Attributes:
      y: a column of the results, 'test_error' for example.
      x: 'step', for curves, or an axis.
      lines: an axis; a line for each of its values.
      panels: an axis; a panel for each of its values.
      fixed: axes and the value that is shown.
      over_steps: with x an axis, 'last' evaluation or 'mean' over the evaluations of a run.
      log_y: whether y has a logarithmic scale.
      title: of the figure.
    """

    y: str = "test_error"
    x: str = "step"
    lines: str | None = None
    panels: str | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    over_steps: str = "last"
    log_y: bool = False
    title: str = ""

    @property
    def axes(self) -> set[str]:
        """The axes that have a place in it."""
        placed = (self.x, self.lines, self.panels, *self.fixed)
        return {axis for axis in placed if axis not in (None, "step")}


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      point: the value (or its name) on each axis.
      seed: of the run.
      fields: of the config, that the axes and the seed set.
    """

    point: Mapping[str, Any]
    seed: int
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What tells it from all others, as text."""
        return json.dumps({**self.point, "seed": self.seed})

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        parts = [f"{axis.split('.')[-1]}={value}" for axis, value in self.point.items()]
        plain = ",".join([*parts, f"seed={self.seed}"])
        folder = re.sub(r"[^\w.=,+-]+", "_", plain)[:150]
        if folder == plain:
            return folder
        return f"{folder},{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    def config(self, base: ConfigDict) -> ConfigDict:
        """Returns its configuration, from the one that all members share."""
        return with_fields(base, self.fields, self.name)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid of runs, each point with several seeds.

    Attributes:
      title: of the report.
      configs: a config file for each data set that the experiment has settings for, by
        `dataset.name`, as seen from the experiment file. The first is the default; a data set
        without one takes it too.
      text: what it is about, for the report.
      axes: by name. An axis called as a field of the config has its values; any other has named
        variants, each a dict of the fields that it sets.
      seeds: how many, from 0.
      fields: changed in the config for all members.
      baseline: a value on each axis (on some, for a baseline at each value of the others); the
        report compares with it, seed by seed.
      metrics: columns of the results that the report's tables show.
      over_steps: what they show of a run: the 'last' value that was measured, or the 'mean'.
      figures: of the report.

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
        if not self.configs or not self.axes:
            raise UserError("a sweep needs configs and axes, got none")
        if self.seeds < 1:
            raise UserError(f"a sweep needs 1 seed or more, got {self.seeds}")
        for axis, values in self.axes.items():
            if isinstance(values, Mapping):
                wrong = [v for v in values.values() if not isinstance(v, Mapping)]
            else:
                wrong = [v for v in values if not isinstance(v, str | bool | int | float)]
            if wrong:
                raise UserError(
                    f"axis {axis!r} must be numbers, texts and booleans, or named variants, each a "
                    f"dict of fields; got {wrong[0]!r} of {type(wrong[0]).__name__}"
                )
            if axis in RESERVED or not values:
                raise UserError(f"a sweep cannot have the axis {axis!r} with {len(values)} values")
            if len(set(map(repr, values))) != len(values):
                raise UserError(f"axis {axis!r} has a value twice: {list(values)}")
        fixed = [("baseline", self.baseline), *(("figure", f.fixed) for f in self.figures)]
        for what, values in fixed:
            for axis, value in values.items():
                if axis not in self.axes or value not in self.axes[axis]:
                    raise UserError(f"{what}: {value!r} is not on an axis {axis!r} of the sweep")
        for over_steps in (self.over_steps, *(figure.over_steps for figure in self.figures)):
            if over_steps not in ("last", "mean"):
                raise UserError(f"over_steps must be 'last' or 'mean', got {over_steps!r}")
        for figure in self.figures:
            many = {axis for axis, values in self.axes.items() if len(values) > 1}
            if figure.axes - set(self.axes) or many - figure.axes:
                raise UserError(
                    f"the figure of {figure.y!r} must give each axis of {sorted(self.axes)} a "
                    f"place (x, lines, panels or fixed), and has {sorted(figure.axes)}"
                )

    def members(self) -> list[Member]:
        """Returns all runs; the first seed of every point comes first."""
        members = []
        for seed, values in itertools.product(
            range(self.seeds), itertools.product(*self.axes.values())
        ):
            point = dict(zip(self.axes, values, strict=True))
            fields: dict[str, Any] = {}
            for axis, value in point.items():
                changes = self.axes[axis]
                new = changes[value] if isinstance(changes, Mapping) else {axis: value}
                twice = sorted(set(new) & set(fields))
                if twice:
                    raise UserError(f"two axes set the field {twice[0]}; leave it to one of them")
                fields |= new
            members.append(Member(point, seed, {**fields, "seed": seed}))
        return members

    def base_config(self, config: ConfigDict) -> ConfigDict:
        """Returns the config that all members share, with what the sweep itself changes."""
        for field in [*self.fields, *self.swept_fields]:
            check_field(config, field)
        return with_fields(config, self.fields, "the sweep's fields")

    @property
    def swept_fields(self) -> list[str]:
        """The fields in which members may differ, the seed apart."""
        named = {field: None for member in self.members() for field in member.fields}
        return [field for field in named if field != "seed"]
