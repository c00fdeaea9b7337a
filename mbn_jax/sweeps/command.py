"""What `mbn-sweep` and `mbn-report` do, from an experiment file to a report."""

import dataclasses
import importlib.metadata
import pathlib
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence

import jax
import optuna
from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.declaration import Sweep
from mbn_jax.sweeps.report import write_report
from mbn_jax.sweeps.results import read_results, write_results
from mbn_jax.sweeps.runner import Runner
from mbn_jax.training.config_files import (
    call_in_file,
    override_fields,
    parse_config,
    with_import_dir,
)
from mbn_jax.training.workdir import make_folder

PACKAGES = ("mbn-jax", "jax", "jaxlib", "flax", "optax", "numpy")


def load_sweep(path: str, overrides: Sequence[str], seeds: int | None) -> tuple[Sweep, ConfigDict]:
    """Reads an experiment file; returns the sweep and the config that all members share.

    `overrides` and `seeds` change what the file says. Raises UserError where these cannot work.
    """
    sweep = call_in_file(path, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise UserError(f"get_sweep() of {path} must return a Sweep, got {type(sweep)}")
    if seeds is not None:
        sweep = dataclasses.replace(sweep, seeds=seeds)
    taken = {"seed", *sweep.swept_fields}
    for override in overrides:
        name = override.split("=", 1)[0].removeprefix("--config.")
        if name in taken:
            raise UserError(f"{name} is set by the axes and seeds of {path}; leave it out")
    files = {key: str(pathlib.Path(path).parent / file) for key, file in sweep.configs.items()}
    default = next(iter(files.values()))
    dataset = parse_config(default, overrides).dataset.name
    file = files.get(dataset, default)
    config = override_fields(sweep.base_config(parse_config(file)), overrides)
    names = [value for member in sweep.members() for value in member.fields.values()]
    return sweep, with_import_dir(config, file, names)


def dry_run(
    experiment: str, overrides: Sequence[str], seeds: int | None, workdir: pathlib.Path
) -> str:
    """Returns the members and the number of compilations, all checked; writes nothing."""
    sweep, config = load_sweep(experiment, overrides, seeds)
    runner = Runner(sweep, config, workdir)
    total = (
        f"{len(runner.members)} members, {runner.num_programs} compilations of the step on each "
        f"of {len(runner.devices)} devices"
    )
    return "\n".join([*(member.name for member in runner.members), total])


def open_sweep(
    experiment: str,
    overrides: Sequence[str],
    seeds: int | None,
    workdir: pathlib.Path,
    storage: str | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    retry_failed: bool = False,
) -> tuple[Runner, optuna.Study]:
    """Prepares a sweep to run or to go on; returns its runner and the study of its state.

    The arguments are those of `mbn-sweep`; `devices` are all of this host by default. Raises
    UserError for a file, a field, a value or a workdir that cannot work.
    """
    sweep, config = load_sweep(experiment, overrides, seeds)
    runner = Runner(sweep, config, workdir, devices)
    make_folder(workdir)
    study = store.open_study(workdir, storage)
    store.check_sweep(study, config, sweep.members())
    if retry_failed:
        store.retry_failed(study)
    study.set_user_attr(store.SWEEP, describe(sweep))
    return runner, study


def run_sweep(workdir: pathlib.Path, runner: Runner, study: optuna.Study) -> Counter:
    """Runs what is missing, and writes results and report; counts members by outcome."""
    outcomes = runner.run(study)
    write_all(workdir, study)
    return outcomes


def describe(sweep: Sweep) -> dict:
    """Returns what a report must know of a sweep, in the types of JSON."""
    device = jax.local_devices()[0]
    return {
        "title": sweep.title,
        "text": sweep.text,
        "axes": {axis: list(values) for axis, values in sweep.axes.items()},
        "fields": sweep.swept_fields,
        "seeds": sweep.seeds,
        "baseline": dict(sweep.baseline),
        "metrics": list(sweep.metrics),
        "over_steps": sweep.over_steps,
        "figures": [dataclasses.asdict(figure) for figure in sweep.figures],
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": f"{device.platform} {device.device_kind}",
    }


def report_sweep(workdir: pathlib.Path, storage: str | None = None) -> pathlib.Path:
    """Writes the results and the report of a sweep, as far as it is; returns their `report.html`.

    Raises UserError where there is no sweep, or it has no members yet.
    """
    study = store.open_study(workdir, storage, create=False)
    if store.SWEEP not in study.user_attrs or not store.trials_by_member(study):
        raise UserError(f"{workdir} has no members yet; start the sweep with mbn-sweep")
    return write_all(workdir, study)


def write_all(workdir: pathlib.Path, study: optuna.Study) -> pathlib.Path:
    """Writes `results.csv`, `results.parquet` and the report; returns the path of `report.html`."""
    results = read_results(study)
    write_results(results, workdir)
    return write_report(study, results, workdir)
