"""Members, their state and their results in an Optuna study: the queue that survives its runners.

A member is one run of the sweep; a trial is one attempt at a member. Claiming a trial is atomic,
whoever asks. A trial whose runner is gone is abandoned, and its member gets another. How a member
ended is an attribute of its trial, `OUTCOME`; a trial that ended without one did not finish.
"""

import datetime
import json
import pathlib
import time
import warnings
from collections.abc import Iterator, Sequence

import optuna
import sqlalchemy
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState

from mbn_jax.errors import UserError, one_line
from mbn_jax.sweeps.declaration import Member
from mbn_jax.training.config import changes, fields
from mbn_jax.training.workdir import without_removed_fields

STUDY = "sweep.db"
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
CAPACITY = "norm.memory_capacity"

# Attributes of a trial,
MEMBER = "member"
FOLDER = "folder"
FIELDS = "fields"
OUTCOME = "outcome"
REASON = "reason"
STEP = "step"
RECORDS = "records"
COST = "cost"  # Its seconds are those of all attempts so far.
RUNNER = "runner"
# and of the study.
CONFIG = "config"
SWEEP = "sweep"
RETRIED = "retried"

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
DUPLICATE = "duplicate"


def open_study(
    workdir: pathlib.Path, storage: str | None = None, *, create: bool = True
) -> optuna.Study:
    """Opens the study of a sweep, or makes it; raises UserError where that cannot be.

    Args:
      workdir: the sweep's folder.
      storage: SQLAlchemy URL of a database for several machines, where the study has the workdir's
        name; default: SQLite in the workdir.
      create: whether to make one that is missing.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Optuna has called heartbeats, and what follows from them, experimental for years.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    path = (workdir / STUDY).absolute()
    if not create and storage is None and not path.exists():
        raise UserError(f"{workdir} is not the folder of a sweep: it has no {STUDY}")
    name = workdir.absolute().name if storage else "sweep"
    for attempts_left in reversed(range(5)):
        try:
            database = _database(storage or _sqlite_url(path))
            if create:
                return optuna.create_study(storage=database, study_name=name, load_if_exists=True)
            return optuna.load_study(storage=database, study_name=name)
        except KeyError as error:
            raise UserError(f"{storage or path} has no sweep called {name!r}") from error
        except (
            ImportError,
            ValueError,
            sqlalchemy.exc.SQLAlchemyError,
            optuna.exceptions.StorageInternalError,
        ) as error:
            # Two runners that start together may make the same tables; the second finds them.
            if attempts_left and isinstance(error, sqlalchemy.exc.DBAPIError):
                time.sleep(1)
                continue
            raise UserError(
                f"cannot open the sweep's database {storage or path}: {one_line(error)}"
            ) from error
    raise AssertionError("unreachable")


def _sqlite_url(path: pathlib.Path) -> str:
    """Returns the URL of a file, with what has a meaning in URLs (? # %) and in Optuna ({}) quoted.

    >>> _sqlite_url(pathlib.Path("/runs/50 % {a}?/sweep.db"))
    'sqlite:////runs/50 %25 %7Ba%7D%3F/sweep.db'
    """
    url = sqlalchemy.engine.URL.create("sqlite", database=str(path))
    return url.render_as_string(hide_password=False)


def _database(url: str) -> optuna.storages.RDBStorage:
    is_sqlite = url.startswith("sqlite")
    database = optuna.storages.RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        # For SQLite: seconds to wait for another writer.
        engine_kwargs={"connect_args": {"timeout": 60}} if is_sqlite else None,
    )
    if is_sqlite:
        # SQLite has no SELECT FOR UPDATE, by which Optuna makes a claim atomic: two runners that
        # read at the same time would both have the trial. So lock for each transaction.
        @sqlalchemy.event.listens_for(database.engine, "connect")
        def leave_transactions_to_sqlalchemy(connection, _) -> None:
            connection.isolation_level = None

        @sqlalchemy.event.listens_for(database.engine, "begin")
        def lock(connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        database.engine.dispose()
    return database


def check_sweep(study: optuna.Study, config: ConfigDict, members: Sequence[Member]) -> None:
    """Binds a study to its members' settings; what has run must be declared as it ran.

    More members than before are fine. Raises UserError for another config than the members shared
    so far, or a member that is gone or has other fields.
    """
    now = fields(config)
    before = without_removed_fields(study.user_attrs.get(CONFIG, now), "the sweep in this workdir")
    before |= {"import_dir": config.import_dir}
    differing = changes(before, now)
    if differing:
        raise UserError(
            f"the sweep in this workdir has another config ({differing}); use another --workdir, "
            "or the config it was started with"
        )
    declared = {member.name: member.fields for member in members}
    known = trials_by_member(study)
    gone = set(known) - set(declared)
    if gone:
        raise UserError(
            f"the sweep in this workdir has {len(gone)} members that the experiment no longer "
            f"declares ({min(gone)}); put them back, or use another --workdir"
        )
    for name, trial in known.items():
        ran = trial.user_attrs[FIELDS]
        # The runner may have set the capacity, for the largest memory that was declared then.
        before = {k: v for k, v in ran.items() if k in declared[name] or k != CAPACITY}
        if before != json.loads(json.dumps(declared[name])):  # JSON has lists for tuples.
            raise UserError(
                f"the sweep in this workdir ran {name} with {before}, which the experiment now "
                f"declares with {dict(declared[name])}; use another --workdir, or change it back"
            )
    study.set_user_attr(CONFIG, now)


def enqueue_missing(study: optuna.Study, members: Sequence[Member]) -> None:
    """Enqueues the members that are neither waiting nor running nor done.

    One that was enqueued before keeps the fields that it had.
    """
    known = trials_by_member(study)
    missing = [member for member in members if member.name not in known]
    if not missing:
        return
    earlier = {
        t.user_attrs[MEMBER]: t.user_attrs[FIELDS]
        for t in study.get_trials(deepcopy=False)
        if MEMBER in t.user_attrs
    }
    for member in missing:
        attributes = {
            MEMBER: member.name,
            FOLDER: member.folder,
            FIELDS: earlier.get(member.name, dict(member.fields)),
        }
        study.enqueue_trial({}, user_attrs=attributes)


def retry_failed(study: optuna.Study) -> None:
    """Lets the members that failed run again; those that diverged would do so again."""
    failed = [t.number for t in trials_by_member(study).values() if outcome(t) == FAILED]
    study.set_user_attr(RETRIED, [*study.user_attrs.get(RETRIED, []), *failed])


def abandon_stale(study: optuna.Study) -> None:
    """Ends the trials whose runner has been silent for `GRACE_SECONDS`: it is gone, or asleep."""
    optuna.storages.fail_stale_trials(study)
    # Optuna does not see those that were killed between their claim and their first heartbeat.
    now = datetime.datetime.now()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        assert trial.datetime_start is not None
        seconds = (now - trial.datetime_start).total_seconds()
        if RUNNER not in trial.user_attrs and seconds > GRACE_SECONDS:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def is_duplicate(study: optuna.Study, number: int, member: str) -> bool:
    """Whether an older trial is of the same member: two runners enqueued it at the same time."""
    return any(
        t.number < number and t.user_attrs[MEMBER] == member for t in _trials_that_count(study)
    )


def seconds_before(study: optuna.Study, number: int, member: str) -> float:
    """Returns the seconds that earlier attempts at a member took, as far as they are known."""
    attempts = [t for t in study.get_trials(deepcopy=False) if t.number < number]
    attempts = [t for t in attempts if t.user_attrs.get(MEMBER) == member and COST in t.user_attrs]
    return max((t.user_attrs[COST]["seconds"] for t in attempts), default=0.0)


def trials_by_member(study: optuna.Study) -> dict[str, FrozenTrial]:
    """Returns the trial that tells of each member, by name."""
    found: dict[str, FrozenTrial] = {}
    for trial in _trials_that_count(study):
        found.setdefault(trial.user_attrs[MEMBER], trial)
    return found


def outcome(trial: FrozenTrial) -> str:
    """Returns 'finished', 'diverged', 'failed', 'running' or 'waiting'."""
    return trial.user_attrs.get(OUTCOME) or trial.state.name.lower()


def _trials_that_count(study: optuna.Study) -> Iterator[FrozenTrial]:
    """Yields the trials that stand for a member: not duplicates, not abandoned, not retried."""
    retried = study.user_attrs.get(RETRIED, [])
    for trial in study.get_trials(deepcopy=False):
        how = trial.user_attrs.get(OUTCOME)
        is_abandoned = trial.state.is_finished() and how is None
        if is_abandoned or how == DUPLICATE or trial.number in retried:
            continue
        if MEMBER in trial.user_attrs:
            yield trial
