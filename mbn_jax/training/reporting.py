"""What a run leaves for people: a progress line, `metrics.jsonl`, TensorBoard events, curves."""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping

from absl import logging

from mbn_jax.errors import UserError
from mbn_jax.training.events import Events
from mbn_jax.training.workdir import replace, writing

METRICS = "metrics.jsonl"
CURVES = "curves.png"


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Reads the records of a run, oldest first; `[]` where there are none.

    A last line that a kill cut short is no record.

    Raises:
      UserError: for any other line that is none, naming it.
    """
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
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"Line {number} of {path} is damaged; put the file back from a copy, or delete it: "
                "the run goes on without its earlier records."
            ) from error
        records.append(record)
    return records


def check_records(workdir: pathlib.Path, step: int, digest: str | None) -> None:
    """Checks the records up to a checkpoint; says so where the file is gone.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      digest: of these records, noted with it; None: none was.

    Raises:
      UserError: where they are not those that were written.
    """
    path = workdir / METRICS
    if digest is None:
        return
    lines = _lines(r for r in read_metrics(workdir) if r["step"] <= step)
    if hashlib.sha256(lines).hexdigest() == digest:
        return
    if not lines:  # Deleted, now or before an earlier start.
        logging.warning("%s is gone: the records up to step %d are lost.", path, step)
    else:
        raise UserError(
            f"{path} is damaged: up to step {step} it is not what the run wrote; put it back from "
            "a copy, or delete it: the run goes on without its earlier records."
        )


def _lines(records: Iterable[Mapping[str, float]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


class Reporter:
    """Writes the records of a run, and the line that shows how far it is."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        first_step: int,
        total_steps: int,
        on_record: Callable[[int, dict[str, float]], None] | None = None,
        silent: bool = False,
    ):
        """Goes on after `first_step`: records past it, to be written again, are dropped.

        One with `on_record` calls it with every record and shows nothing. A `silent` one writes
        nothing either: that of a host that is not the first.
        """
        self._silent = silent
        self._on_record = on_record
        self._workdir = workdir
        if silent:
            return
        self._total_steps = total_steps
        self._first_step = first_step
        self._begin = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._line_is_open = False
        kept = [r for r in read_metrics(workdir) if r["step"] <= first_step]
        lines = _lines(kept)
        replace(workdir / METRICS, lines)
        self._digest = hashlib.sha256(lines)
        with writing(workdir), contextlib.ExitStack() as files:
            self._metrics = files.enter_context((workdir / METRICS).open("ab"))
            self._events = Events(workdir, first_step=first_step)
            files.callback(self._events.close)
            self._files = files.pop_all()

    def write(self, step: int, values: Mapping[str, float], *, only_events: bool = False) -> None:
        """Writes one record: a line of `metrics.jsonl`, and a scalar a value for TensorBoard."""
        if self._silent:
            return
        if not only_events:
            line = _lines([{"step": step, **values}])
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
        """Shows step, loss, error, images/s and the time left."""
        if self._silent or self._on_record:
            return
        done = step - self._first_step
        left = (time.monotonic() - self._begin) / max(done, 1) * (self._total_steps - step)
        line = (
            f"step {step}/{self._total_steps}  loss {values['train_loss']:.4f}  "
            f"error {values['train_error']:.2%}  {values['images_per_second']:,.0f} images/s  "
            f"{left:.0f} s left"
        )
        if self._is_terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            self._line_is_open = True
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        if self._silent or self._on_record:
            return
        print(f"\r\033[K{line}" if self._is_terminal else line, file=sys.stderr, flush=True)
        self._line_is_open = False

    def close(self) -> None:
        """Flushes and closes the files, and leaves the progress line."""
        if self._silent:
            return
        if self._is_terminal and self._line_is_open:
            print(file=sys.stderr)
        with writing(self._workdir):
            self._files.close()


def draw_curves(workdir: pathlib.Path, title: str) -> None:
    """Draws loss and error of training and test over the steps into `curves.png`.

    Without a record there is nothing to draw, and no file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(workdir)
    if not records:
        return
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, metric, scale, label in zip(
        panels, ("loss", "error"), (1, 100), ("loss", "error (%)"), strict=True
    ):
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
