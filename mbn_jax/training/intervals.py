"""When a run evaluates, saves, measures and writes a record."""

import dataclasses

from ml_collections import ConfigDict

from mbn_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class Intervals:
    """What a run does after which step; plain numbers, because it is asked after every dispatch.

    Attributes:
      total: total training steps; after the last one all is due.
      evaluation: steps between two evaluations.
      checkpoint: steps between two checkpoints.
      shift: steps between two measurements of the shift; 0: none.
      log: steps between two records; evaluations, checkpoints and measurements write one too.
      keep_best: whether checkpoints are evaluated, to keep the best.
    """

    total: int
    evaluation: int
    checkpoint: int
    shift: int
    log: int
    keep_best: bool

    @classmethod
    def of(cls, task: Task, config: ConfigDict) -> "Intervals":
        """Returns the intervals of a run; an epoch is rounded up to whole dispatches."""
        stride = config.steps_per_dispatch
        epoch = -(-task.steps_per_epoch // stride) * stride
        return cls(
            total=task.total_steps,
            evaluation=config.eval_every_steps or epoch,
            checkpoint=config.checkpoint_every_steps or epoch,
            shift=config.shift.every_steps,
            log=config.log_every_steps,
            keep_best=config.keep_best,
        )

    def evaluates_after(self, step: int) -> bool:
        """Returns whether an evaluation is due."""
        due = step == self.total or step % self.evaluation == 0
        return due or (self.keep_best and self.saves_after(step))

    def saves_after(self, step: int) -> bool:
        """Returns whether a checkpoint is due."""
        return step == self.total or step % self.checkpoint == 0

    def measures_after(self, step: int) -> bool:
        """Returns whether a measurement of the shift is due."""
        return self.shift > 0 and (step == self.total or step % self.shift == 0)

    def logs_after(self, step: int) -> bool:
        """Returns whether a record is due."""
        return (
            step % self.log == 0
            or self.evaluates_after(step)
            or self.saves_after(step)
            or self.measures_after(step)
        )
