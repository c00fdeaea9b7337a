"""What a run leaves for people: a progress line, `metrics.jsonl`, TensorBoard events, curves."""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping

from tensorboardX import SummaryWriter

from mbn_jax.workdir import replace

METRICS = "metrics.jsonl"
CURVES = "curves.png"


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Reads the records of a run, oldest first; `[]` where there are none.

    A last line that a kill cut short is no record.
    """
    try:
        lines = (workdir / METRICS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


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
        if silent:
            return
        self._total_steps = total_steps
        self._first_step = first_step
        self._begin = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._line_is_open = False
        kept = [r for r in read_metrics(workdir) if r["step"] <= first_step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        replace(workdir / METRICS, lines.encode())
        self._metrics = (workdir / METRICS).open("a")
        self._events = SummaryWriter(str(workdir), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float], *, only_events: bool = False) -> None:
        """Writes one record: a line of `metrics.jsonl`, and a scalar a value for TensorBoard."""
        if self._silent:
            return
        if not only_events:
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            self._metrics.flush()
            if self._on_record:
                self._on_record(step, dict(values))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

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
        self._metrics.close()
        self._events.close()


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
