"""What a running sweep shows: a line for each member that ends, the counts and the time left."""

import time
from collections import Counter
from collections.abc import Mapping

from optuna.trial import FrozenTrial

from mbn_jax.sweeps import storage as store
from mbn_jax.terminal import StatusLine, duration
from mbn_jax.training.reporting import of_split, shown

ENDS = (store.FINISHED, store.DIVERGED, store.FAILED)


class Progress:
    """Tells of the members that end from now on, whoever runs them."""

    def __init__(self, num_members: int, trials: Mapping[str, FrozenTrial]):
        """Shows nothing yet; `trials` are by member, as in `store.trials_by_member`."""
        self._num_members = num_members
        self._ended = {name for name, trial in trials.items() if store.outcome(trial) in ENDS}
        self._ended_before = len(self._ended)
        self._begin = time.monotonic()
        self._line = StatusLine()

    def update(self, trials: Mapping[str, FrozenTrial], *, stopping: bool) -> None:
        """Shows what has changed, and whether this process was asked to stop."""
        total = max(len(trials), self._num_members)  # Another runner may know of more.
        for name, trial in trials.items():
            if name not in self._ended and store.outcome(trial) in ENDS:
                self._ended.add(name)
                self._line.say(f"{len(self._ended)}/{total} {name}: {_ending(trial)}")
        counts = Counter(store.outcome(trial) for trial in trials.values())
        kinds = ("running", store.DIVERGED, store.FAILED)
        shown = [f"{len(self._ended)}/{total} members"]
        shown += [f"{counts[kind]} {kind}" for kind in kinds if counts[kind]]
        ended_since = len(self._ended) - self._ended_before
        if stopping:
            shown.append("stopping at the next step of each")
        elif ended_since:
            seconds = (time.monotonic() - self._begin) / ended_since * (total - len(self._ended))
            shown.append(f"{duration(seconds)} left")
        self._line.show(", ".join(shown))

    def close(self) -> None:
        """Ends the line of counts."""
        self._line.close()


def _ending(trial: FrozenTrial) -> str:
    """Returns in words how a member ended."""
    outcome = store.outcome(trial)
    if outcome != store.FINISHED:
        return f"{outcome}: {trial.user_attrs[store.REASON]}"
    metrics = [of_split("test", record) for record in trial.user_attrs[store.RECORDS]]
    last = next((found for found in reversed(metrics) if found), [])
    result = ", ".join(f"test {name} {shown(name, x)}" for name, x in last if name == "error")
    result = result or ", ".join(f"test {name} {shown(name, x)}" for name, x in last)
    result = result or "no test error on record"
    return f"{result} in {trial.user_attrs[store.COST]['seconds']:.1f} s"
