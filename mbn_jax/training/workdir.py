"""The folder of a run: its config, with which others it may resume, and its one writer."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from absl import logging
from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.names import is_import_path
from mbn_jax.training.config import FIELDS, changes, default_config, fields, flattened
from mbn_jax.training.config_files import is_in_kwargs

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
LOCK = "lock"

UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

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
    "steps_per_dispatch",
)
"""Fields that a run may change when it resumes. All others bind: they change what is trained or
what a recorded number means."""

LENGTH = "num_epochs"
"""The field that a run may raise, where nothing in training depends on the end of the run."""

REMOVED: Mapping[str, Any] = {"runtime": "pmap"}
"""Fields that earlier versions had, and the values at which they mean what this version does."""


def open_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Makes `workdir`; raises UserError where it is a run that may not resume with `config`."""
    make_folder(workdir)
    if (workdir / CONFIG).exists():
        before = fields(load_config(workdir))
        check_may_resume(before, fields(config), f"{workdir} is a run of")


def make_folder(workdir: pathlib.Path) -> None:
    """Makes a workdir where it is missing; raises UserError where that cannot be."""
    try:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"Cannot write to --workdir={workdir}: {error.strerror}.") from error


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the run configuration of a workdir.

    A field that did not exist when it was written has its default.

    Raises:
      UserError: where there is no config, or it has fields or values that this version lacks.
    """
    path = workdir / CONFIG
    try:
        stored = without_removed_fields(flattened(json.loads(path.read_text())), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{workdir} is not the folder of a run: it has no {CONFIG}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UserError:
        raise
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    config = default_config()
    unknown = sorted(n for n in set(stored) - set(fields(config)) if not is_in_kwargs(n))
    if unknown:
        raise UserError(
            f"{path} is damaged, or of another version of this package: it has the unknown fields "
            f"{', '.join(unknown)}."
        )
    _check_types(stored, path)
    with config.ignore_type():  # JSON has lists for tuples.
        config.update_from_flattened_dict(stored)
    return config


def _check_types(stored: Mapping[str, Any], path: pathlib.Path) -> None:
    """Raises UserError for a value that JSON would not have made of a field."""
    for name, value in stored.items():
        if name not in FIELDS:
            continue
        default = FIELDS[name].default
        allowed = {tuple: (list,), float: (float, int)}.get(type(default), (type(default),))
        if type(value) not in allowed:
            raise UserError(
                f"{path} is damaged: {name} must be like {json.dumps(default)}, got "
                f"{json.dumps(value)}."
            )


def save_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the resolved configuration as `config.json`, whole or not at all."""
    replace(workdir / CONFIG, (config.to_json(indent=1) + "\n").encode())


def without_removed_fields(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns stored fields, by dotted name, without those that no longer exist.

    Raises:
      UserError: where one of these has a value that this version cannot do.
    """
    for field, value in REMOVED.items():
        if stored.get(field, value) != value:
            raise UserError(
                f"{where} has {field}={stored[field]!r}, which this version no longer supports; "
                "use the version that made it."
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
    before = dict(before) | {field: now[field] for field in MAY_CHANGE}
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


def check_checkpoint(
    config: ConfigDict, noted: Mapping[str, Any] | None, workdir: pathlib.Path
) -> None:
    """Checks that the checkpoint of a workdir fits a config; raises UserError.

    `noted` has the `fields` of the config that it was made with; None: there is no checkpoint.
    """
    if noted is not None:
        where = f"The checkpoint in {workdir}"
        check_may_resume(without_removed_fields(noted, where), fields(config), f"{where} is of")


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Turns the errors of a workdir that cannot be written, or is full, into UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"Cannot write to --workdir={workdir}: {os.strerror(error.errno)}; fix this, and run "
            "the same command to resume from the last checkpoint."
        ) from error


def replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else writes it; raises UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with writing(path.parent):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def only_writer(
    workdir: pathlib.Path, *, waits: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Holds the lock of a workdir, which exists: on this machine and, over NFS, on all.

    Args:
      workdir: folder of a run.
      waits: asked now and then, while another process holds the lock, whether to wait for it.

    Raises:
      UserError: where another process holds it, saying which.
    """
    with writing(workdir):
        # Another process may hold it: its text must stay. Closed, or at the end of the process, it
        # is released.
        opened = (workdir / LOCK).open("a+")
    with opened as file:
        while not _try_to_lock(file):
            if not waits():
                holder = (workdir / LOCK).read_text(errors="replace").strip()
                raise UserError(
                    f"Another process writes to {workdir}: {holder or 'it has not said which'}; "
                    "wait for its end, stop it, or use another --workdir."
                )
            time.sleep(0.5)
        yield


def _try_to_lock(file: IO[str]) -> bool:
    """Locks the file and writes into it who holds it; returns False where another one does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Linux locks over NFS too by this.
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logging.warning(
            "%s cannot be locked (%s): see to it that only one run writes to its folder.",
            file.name,
            os.strerror(error.errno),
        )
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    with writing(pathlib.Path(file.name).parent):
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}, since {now}\n")
        file.flush()
    return True
