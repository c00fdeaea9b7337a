"""Members, their state and their results in an Optuna study: the queue that survives its runners.

A member is a trial. Claiming one is atomic, whoever asks; a trial whose runner stopped sending
heartbeats is given up, and the member is enqueued again. What became of a member is an attribute of
its trial, `OUTCOME`; a trial that ended without one did not finish.
"""

import datetime
import pathlib
import platform
import time
import uuid
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
import psutil
import sqlalchemy.exc
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState

from mbn_jax.config import changes, fields
from mbn_jax.errors import UserError
from mbn_jax.sweeps.declaration import Member

STUDY = "sweep.db"
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60

MEMBER = "member"
FIELDS = "fields"
OUTCOME = "outcome"
REASON = "reason"
STEP = "step"
RECORDS = "records"
COST = "cost"
RUNNER = "runner"

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
DUPLICATE = "duplicate"


def storage_url(workdir: pathlib.Path) -> str:
    """Returns the address of the database in a workdir."""
    return f"sqlite:///{(workdir / STUDY).absolute()}"


def open_study(workdir: pathlib.Path, storage: str | None = None) -> optuna.Study:
    """Opens the study of a workdir, made where it is missing.

    Args:
      workdir: of the sweep; its name is the study's.
      storage: an SQLAlchemy address, for several machines; default: SQLite in the workdir.

    Raises:
      UserError: where the database cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Heartbeats and what follows from them are experimental in name, for years.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    url = storage or storage_url(workdir)
    # Of SQLite: seconds to wait for another writer.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    for attempts_left in reversed(range(5)):
        try:
            database = optuna.storages.RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                engine_kwargs=options,
            )
            return optuna.create_study(
                storage=database, study_name=workdir.absolute().name, load_if_exists=True
            )
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
            reason = " ".join(str(error).split())
            raise UserError(f"cannot open the sweep's database {url}: {reason}") from error
    raise AssertionError("unreachable")


def check_config(study: optuna.Study, config: ConfigDict) -> None:
    """Binds a study to the config that its members share; refuses another one."""
    now = fields(config)
    before = study.user_attrs.get("config")
    if before is None:
        study.set_user_attr("config", now)
        return
    differing = changes(before, now)
    if differing:
        raise UserError(
            f"the sweep in this workdir has another config ({differing}); use another --workdir, "
            "or the config it was started with"
        )


def enqueue_missing(study: optuna.Study, members: Sequence[Member], capacity: int) -> None:
    """Enqueues the members that are neither waiting nor running nor done.

    Args:
      study: of the sweep.
      members: all that are declared.
      capacity: slots of the memory of members that are enqueued now; once enqueued, a member keeps
        its own.
    """
    known = {t.user_attrs[MEMBER] for t in study.get_trials(deepcopy=False) if _counts(t)}
    for member in members:
        if member.name not in known:
            attributes = {
                MEMBER: member.name,
                FIELDS: {**member.fields, "norm.memory_capacity": capacity},
            }
            study.enqueue_trial({}, user_attrs=attributes)


def this_runner() -> dict[str, Any]:
    """Returns what tells this process from all others, on whatever machine."""
    process = psutil.Process()
    host = f"{platform.node()} {uuid.getnode():x}"  # Containers may share a name.
    return {"host": host, "pid": process.pid, "started": process.create_time()}


def give_up_stale(study: optuna.Study) -> None:
    """Ends the trials whose runner is gone: at once on this machine, else when it falls silent."""
    optuna.storages.fail_stale_trials(study)
    now = datetime.datetime.now()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        runner = trial.user_attrs.get(RUNNER)
        if runner is None:  # Perhaps killed between its claim and its first heartbeat.
            assert trial.datetime_start is not None
            gone = (now - trial.datetime_start).total_seconds() > GRACE_SECONDS
        else:
            gone = runner["host"] == this_runner()["host"] and not _is_alive(runner)
        if gone:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _is_alive(runner: dict[str, Any]) -> bool:
    try:
        return psutil.Process(runner["pid"]).create_time() == runner["started"]
    except psutil.NoSuchProcess:
        return False


def is_duplicate(study: optuna.Study, number: int, member: str) -> bool:
    """Whether an older trial is of the same member: two runners enqueued it at the same time."""
    return any(
        t.number < number and _counts(t) and t.user_attrs[MEMBER] == member
        for t in study.get_trials(deepcopy=False)
    )


def trials_by_member(study: optuna.Study) -> dict[str, FrozenTrial]:
    """Returns the trial that tells of each member, by name."""
    found: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if _counts(trial):
            found.setdefault(trial.user_attrs[MEMBER], trial)
    return found


def outcome(trial: FrozenTrial) -> str:
    """Returns 'finished', 'diverged', 'failed', 'running' or 'waiting'."""
    return trial.user_attrs.get(OUTCOME) or trial.state.name.lower()


def _counts(trial: FrozenTrial) -> bool:
    """Whether the trial stands for its member: not a duplicate, and not given up."""
    attributes: dict[str, Any] = trial.user_attrs
    if MEMBER not in attributes or attributes.get(OUTCOME) == DUPLICATE:
        return False
    return not trial.state.is_finished() or OUTCOME in attributes
