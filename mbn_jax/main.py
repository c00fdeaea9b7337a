"""The front door of the commands: entry points, one sentence for a mistake, an exit status."""

import gc
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence

from mbn_jax.errors import ExitStatus, StoppedError, UserError
from mbn_jax.sweeps.arguments import report_command, sweep_command
from mbn_jax.terminal import make_streams_unbreakable
from mbn_jax.training.arguments import eval_command, train_command

RESUME = "run the same command to resume"


def _run(name: str, command: Callable[[Sequence[str]], int]) -> None:
    """Runs a command with the process's arguments, and exits with its status."""
    make_streams_unbreakable()
    # Imports and traces make many objects that stay. Looking through them again and again takes a
    # tenth of the time up to the first step.
    gc.set_threshold(10_000, 50)
    sys.unraisablehook = _show_unraisable
    try:
        from absl import logging  # Of the extra 'train', as much that commands import.

        logging.set_verbosity(logging.WARNING)
        status = command(sys.argv[1:])
    except UserError as error:
        _tell(f"{name}: {error}")
        status = ExitStatus.USER_MISTAKE
    except KeyboardInterrupt:
        _tell(f"{name}: interrupted; {RESUME}")
        status = ExitStatus.INTERRUPTED
    except Exception as error:
        from mbn_jax.parallel import hosts

        if package := _missing_package(error):
            _tell(
                f"{name}: the package {package} is not installed; this command needs the extra "
                "'train': pip install 'mbn-jax[train]'"
            )
            status = ExitStatus.USER_MISTAKE
        elif isinstance(error, StoppedError):
            if hosts.is_first_host():
                _tell(f"{name}: {error}; {RESUME}")
            status = ExitStatus.STOPPED
        elif told := hosts.lost_host(error):
            _tell(f"{name}: {told}")
            hosts.exit_at_once(ExitStatus.STOPPED)  # Shutting down would wait for the lost host.
        else:
            traceback.print_exc()
            status = ExitStatus.FAILED
    if status not in (ExitStatus.DONE, ExitStatus.STOPPED) and "jax" in sys.modules:
        from mbn_jax.parallel import hosts

        hosts.leave(status)
    sys.exit(status)


def _show_unraisable(unraisable) -> None:
    """Shows what Python cannot raise, but for what TensorStore's threads say after a full disk."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _missing_package(error: Exception) -> str | None:
    """Returns the name of a package that is not installed, where the error says so."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.split(".")[0]
    return package if importlib.util.find_spec(package) is None else None  # Else: a bug.


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def train_main() -> None:
    """Runs `mbn-train`."""
    _run("mbn-train", train_command)


def eval_main() -> None:
    """Runs `mbn-eval`."""
    _run("mbn-eval", eval_command)


def sweep_main() -> None:
    """Runs `mbn-sweep`."""
    _run("mbn-sweep", sweep_command)


def report_main() -> None:
    """Runs `mbn-report`."""
    _run("mbn-report", report_command)


if __name__ == "__main__":
    train_main()
