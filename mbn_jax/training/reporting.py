"""What a run leaves for people: a progress line, `metrics.jsonl`, TensorBoard events, curves."""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from mbn_jax.errors import UserError
from mbn_jax.terminal import StatusLine
from mbn_jax.training.events import Events
from mbn_jax.training.workdir import replace, writing

METRICS = "metrics.jsonl"
CURVES = "curves.png"

_NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_NUMBERS = {name: float(text) for text, name in _NAMES.items()}


def to_json(values: Mapping[str, Any]) -> str:
    """Returns one line of JSON, which has no numbers for NaN and infinity: they are strings.

    >>> to_json({"step": 3, "loss": float("nan")})
    '{"step": 3, "loss": "NaN"}'
    """
    return json.dumps({name: _NAMES.get(str(value), value) for name, value in values.items()})


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Reads the records of a run, oldest first; `[]` where there are none.

    A last line that a kill cut short is no record.

    Raises:
      UserError: for any other line that is none, naming it.
    """
    return [record for _, record in _read(workdir)]


def _read(workdir: pathlib.Path) -> list[tuple[bytes, dict[str, float]]]:
    """Returns the lines of `metrics.jsonl` and what each records."""
    path = workdir / METRICS
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = {name: _NUMBERS.get(value, value) for name, value in json.loads(line).items()}
            record["step"] + 0
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"Line {number} of {path} is damaged; put the file back from a copy, or delete it: "
                "the run resumes without its earlier records."
            ) from error
        records.append((line, record))
    return records


def _lines_until(workdir: pathlib.Path, step: int) -> bytes:
    """Returns the lines of the records up to a step."""
    return b"".join(line for line, record in _read(workdir) if record["step"] <= step)


def check_records(workdir: pathlib.Path, step: int, digest: str | None) -> None:
    """Checks the records up to a checkpoint; says so where the file is missing.

    The checkpoint is of `step`, and notes their SHA-256 as `digest`; None: it notes none.

    Raises:
      UserError: where they are not those that were written.
    """
    path = workdir / METRICS
    if digest is None:
        return
    lines = _lines_until(workdir, step)
    if hashlib.sha256(lines).hexdigest() == digest:
        return
    if not lines:  # Deleted, now or before an earlier start.
        logging.warning("%s is missing: the records up to step %d are lost.", path, step)
    else:
        raise UserError(
            f"{path} is damaged: up to step {step} it is not what the run wrote; put it back from "
            "a copy, or delete it: the run resumes without its earlier records."
        )


class Reporter:
    """Writes the records of a run, and the line that shows how far it is.

    Attributes:
      last: values of the newest record that this run wrote.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        first_step: int,
        total_steps: int,
        on_record: Callable[[int, dict[str, float]], None] | None = None,
        silent: bool = False,
    ):
        """Opens the files of a run that resumes after `first_step`, and drops later records.

        `on_record` is called with step and values of every record, in place of what is shown. A
        `silent` one, on a host that is not the first, writes nothing either.
        """
        self.last: Mapping[str, float] = {}
        self._silent = silent
        self._on_record = on_record
        self._workdir = workdir
        if silent:
            return
        self._total_steps = total_steps
        self._first_step = first_step
        self._begin = time.monotonic()
        self._line = StatusLine()
        lines = _lines_until(workdir, first_step)
        replace(workdir / METRICS, lines)
        self._digest = hashlib.sha256(lines)
        with writing(workdir), contextlib.ExitStack() as files:
            self._metrics = files.enter_context((workdir / METRICS).open("ab"))
            self._events = Events(workdir, first_step=first_step)
            files.callback(self._events.close)
            self._files = files.pop_all()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record: a line of `metrics.jsonl`, and a scalar a value for TensorBoard."""
        self.last = values
        if self._silent:
            return
        line = f"{to_json({'step': step, **values})}\n".encode()
        with writing(self._workdir):
            self._metrics.write(line)
            self._metrics.flush()
        self._digest.update(line)
        if self._on_record:
            self._on_record(step, dict(values))
        with writing(self._workdir):
            for name, value in values.items():
                self._events.scalar(name, value, step)
            self._events.flush()

    def sync(self) -> str | None:
        """Brings the records to disk; returns their digest, None for a silent one."""
        if self._silent:
            return None
        with writing(self._workdir):
            os.fsync(self._metrics.fileno())
        return self._digest.hexdigest()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows step, loss and metrics, images/s and the time left."""
        if self._silent or self._on_record:
            return
        done = step - self._first_step
        left = (time.monotonic() - self._begin) / max(done, 1) * (self._total_steps - step)
        metrics = "  ".join(f"{name} {shown(name, x)}" for name, x in of_split("train", values))
        self._line.show(
            f"step {step}/{self._total_steps}  {metrics}  "
            f"{values['images_per_second']:,.0f} images/s  {left:.0f} s left",
            everywhere=True,
        )

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        if not (self._silent or self._on_record):
            self._line.say(line)

    def close(self) -> None:
        """Flushes and closes the files, and leaves the progress line."""
        if self._silent:
            return
        self._line.close()
        with writing(self._workdir):
            self._files.close()


def of_split(split: str, values: Mapping[str, float]) -> list[tuple[str, float]]:
    """Returns names and values of the metrics of 'train' or 'test' in a record, the loss first.

    >>> of_split('test', {'step': 3, 'test_error': 0.25, 'test_loss': 1.5})
    [('loss', 1.5), ('error', 0.25)]
    """
    names = [name for name in values if name.startswith(f"{split}_")]
    names.sort(key=lambda name: name != f"{split}_loss")
    return [(name.removeprefix(f"{split}_"), values[name]) for name in names]


def shown(name: str, value: float) -> str:
    """Returns a metric for people; errors in percent.

    >>> shown('error', 0.25), shown('iou', 0.25)
    ('25.00%', '0.2500')
    """
    return f"{value:.2%}" if name == "error" else f"{value:.4f}"


def selection_metric(values: Mapping[str, float]) -> float | None:
    """Returns what checkpoints and members of a sweep are compared by: the less, the better.

    That is 'test_error', or 'test_loss' where the loss measures no 'error'; None without either.
    """
    return values.get("test_error", values.get("test_loss"))


def draw_curves(workdir: pathlib.Path, title: str) -> None:
    """Draws loss and metrics of training and test over the steps into `curves.png`.

    Without a record there is nothing to draw, and no file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(workdir)
    if not records:
        return
    found = {
        name for record in records for s in ("train", "test") for name, _ in of_split(s, record)
    }
    metrics = sorted(found, key=lambda name: (name != "loss", name))
    size = (4.5 * len(metrics), 3.6)
    figure, panels = plt.subplots(
        1, len(metrics), figsize=size, layout="constrained", squeeze=False
    )
    for panel, metric in zip(panels[0], metrics, strict=True):
        scale, label = (100, "error (%)") if metric == "error" else (1, metric)
        for split, style in (("train", {"alpha": 0.6}), ("test", {"marker": "o", "markersize": 3})):
            points = [
                (r["step"], r[f"{split}_{metric}"]) for r in records if f"{split}_{metric}" in r
            ]
            if points:
                steps, values = zip(*points, strict=True)
                panel.plot(steps, [v * scale for v in values], label=split, **style)
        panel.set(xlabel="step", ylabel=label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(workdir / CURVES, dpi=120)
    plt.close(figure)
