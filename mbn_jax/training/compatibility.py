"""Whether a run may resume with a config, and whether this version can do what it says."""

from collections.abc import Mapping
from typing import Any

from mbn_jax.errors import UserError
from mbn_jax.names import is_import_path
from mbn_jax.training.config import changes

MAY_CHANGE = (
    # When something is recorded, shown or saved.
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_best",
    "recalibrate_batches",
    "shift.every_steps",
    # Where data is and how it is read.
    "dataset.data_dir",
    "dataset.max_bytes_in_memory",
    "dataset.num_workers",
    "import_dir",
    # How the same computation runs.
    "runtime",
    "steps_per_dispatch",
)
"""Fields that a run may change when it resumes. All others bind: they change what is trained or
what a recorded number means."""

LENGTH = "num_epochs"
"""The field that a run may raise, where nothing in training depends on the end of the run."""

REMOVED: Mapping[str, Any] = {
    "on_divergence": "stop",
    "max_restores": 3,
    "double_forward_every": 1,
    "norm.transport_scale": True,
    "norm.r_max": 0.0,
    "norm.d_max": 0.0,
}
"""Fields that earlier versions had, and the values at which they changed nothing."""

REMOVED_NORM = "averaged"


def without_removed_fields(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of a stored config, by dotted name, without those that no longer exist.

    Raises:
      UserError: where one of these has a value that this version cannot do.
    """
    for field, value in REMOVED.items():
        if stored.get(field, value) != value:
            raise UserError(
                f"{where} has {field}={stored[field]!r}, which this version no longer supports; "
                "use the version that made it."
            )
    if stored.get("norm.name") == REMOVED_NORM:
        raise UserError(
            f"{where} has norm.name={REMOVED_NORM!r}, which this version no longer supports; use "
            "the version that made it, or start a new run with norm.name='memorized' and "
            "norm.memory_size=0."
        )
    return {field: value for field, value in stored.items() if field not in REMOVED}


def check_may_resume(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Checks that a run with one config may resume with another.

    Args:
      before: fields of its config so far, by dotted name.
      now: fields of the config to resume with.
      where: the beginning of the message, for example 'runs/a is a run of'.

    Raises:
      UserError: where a field differs that binds.
    """
    before = dict(before) | {field: now[field] for field in MAY_CHANGE if field in now}
    if now[LENGTH] > before.get(LENGTH, now[LENGTH]):
        cause = _depends_on_the_end(now)
        if cause:
            raise UserError(
                f"{where} {LENGTH}={before[LENGTH]}, and cannot be lengthened to {now[LENGTH]}: "
                f"{cause} depends on the end of the run. Start a new run, with init_from to begin "
                "with these weights."
            )
        before[LENGTH] = now[LENGTH]
    differing = changes(before, now)
    if differing:
        raise UserError(
            f"{where} another config ({differing}); use another --workdir, or the config it was "
            "started with."
        )


def _depends_on_the_end(fields: Mapping[str, Any]) -> str | None:
    """Returns what in training is a function of the fraction of the run that is done, or None."""
    if fields["schedule.name"] not in ("constant", "step"):
        return f"schedule.name={fields['schedule.name']!r}"
    if fields["norm.name"] == "batch_renorm":
        return "norm.batch_renorm"
    has_memory = fields["norm.name"] == "memorized" or is_import_path(fields["norm.name"])
    if has_memory and fields["norm.memory_schedule.start_size"]:
        return "norm.memory_schedule"
    return None
