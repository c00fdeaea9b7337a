"""Names and numbers of a sweep as people read them."""

from collections.abc import Sequence
from typing import TypeVar

import pandas as pd

PERCENT = ("test_error", "train_error", "recalibrated_test_error")
"""Metrics that are fractions, and shown in percent."""

Values = TypeVar("Values", float, pd.Series)


def in_percent(values: Values, metric: str) -> Values:
    """Returns values of a metric as they are shown: fractions in percent."""
    return values * 100 if metric in PERCENT else values


def metric_label(metric: str) -> str:
    """Returns a metric's name for people.

    >>> metric_label('test_error')
    'test error (%)'
    """
    text = metric.replace("_", " ")
    return f"{text} (%)" if metric in PERCENT else text


def axis_label(axis: str) -> str:
    """Returns an axis' name for people.

    >>> axis_label('norm.memory_size'), axis_label('norm.name'), axis_label('step')
    ('memory size', 'norm', 'step')
    """
    return axis.removesuffix(".name").split(".")[-1].replace("_", " ")


def distinct_axis_labels(axes: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Returns labels for the columns of a table, each different from the others and those taken.

    >>> distinct_axis_labels(['optimizer.name', 'norm.name', 'model.name', 'model', 'std'], ['std'])
    ['optimizer', 'norm', 'model.name', 'model', 'std (axis)']
    """
    short = [axis_label(axis) for axis in axes]
    labels: list[str] = []
    for axis, label in zip(axes, short, strict=True):
        name = axis if short.count(label) > 1 else label
        while name in taken or name in labels:
            name += " (axis)"
        labels.append(name)
    return labels


def sentence(text: str) -> str:
    """Returns a text with a capital first letter."""
    return text[:1].upper() + text[1:]
