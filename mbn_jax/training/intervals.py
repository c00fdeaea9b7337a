"""When a run evaluates, saves, measures and writes a record."""

from ml_collections import ConfigDict

from mbn_jax.training.task import Task


class Intervals:
    """What a run does after which step; after the last one, all that it does at all.

    Attributes:
      total: total training steps.
    """

    def __init__(self, task: Task, config: ConfigDict):
        """Reads plain numbers, because it is asked after every dispatch; rounds up an epoch."""
        stride = config.steps_per_dispatch
        epoch = -(-task.steps_per_epoch // stride) * stride
        self.total = task.total_steps
        self._evaluation = config.eval_every_steps or epoch
        self._checkpoint = config.checkpoint_every_steps or epoch
        self._shift = config.shift.every_steps
        self._log = config.log_every_steps
        self._keep_best = config.keep_best

    def evaluates_after(self, step: int) -> bool:
        """Returns whether an evaluation is due; to keep the best, with every checkpoint."""
        due = step == self.total or step % self._evaluation == 0
        return due or (self._keep_best and self.saves_after(step))

    def saves_after(self, step: int) -> bool:
        """Returns whether a checkpoint is due."""
        return step == self.total or step % self._checkpoint == 0

    def measures_after(self, step: int) -> bool:
        """Returns whether a measurement of the shift is due."""
        return self._shift > 0 and (step == self.total or step % self._shift == 0)

    def logs_after(self, step: int) -> bool:
        """Returns whether a record is due: at its own interval, and with all else."""
        return (
            step % self._log == 0
            or self.evaluates_after(step)
            or self.saves_after(step)
            or self.measures_after(step)
        )
