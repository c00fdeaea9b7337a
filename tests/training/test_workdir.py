"""A workdir has one writer, resumes under what may change, and reads what older versions wrote."""

import asyncio
import functools
import gc
import json
import logging
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from runs import assert_same_bits, write_config

from mbn_jax.core.batch_stats import inference_statistics, layers_with_statistics
from mbn_jax.errors import ExitStatus, StoppedError, UserError
from mbn_jax.main import train_command
from mbn_jax.parallel.devices import first_device, replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training.checkpoints import Checkpoints, disk_errors
from mbn_jax.training.config import default_config, fields
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.evaluation import evaluate_run
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import METRICS, Reporter, check_records, read_metrics
from mbn_jax.training.start import with_weights_of
from mbn_jax.training.workdir import CHECKPOINTS, CONFIG, MAY_CHANGE, load_config, only_writer

ONE_DEVICE = Programs(jax.devices()[:1])
final_state = functools.partial(runs.final_state, ONE_DEVICE)


@pytest.fixture(scope="module")
def config(data_dir):
    """Eight steps, four an epoch."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "dataset.data_dir": data_dir,
            "dataset.train_split": "train[:64]",
            "dataset.test_split": "test[:32]",
            "batch_size": 16,
            "num_epochs": 2.0,
            "model.features": (4,),
            "schedule.name": "constant",
            "log_every_steps": 2,
        }
    )
    return config.lock()


def changed(config, **values):
    return with_fields(config, {k.replace("__", "."): v for k, v in values.items()}, "the test")


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The workdir of a finished run; copy it to change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config, workdir, programs=ONE_DEVICE)
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


HOLD = """
import pathlib, sys, time
from mbn_jax.training.workdir import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_second_writer_is_told_who_the_first_one_is(run, config, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        before = (run / METRICS).read_bytes()
        path = run.parent / "config.py"
        write_config(config, path)
        told = rf"Another process writes to .*: process {process.pid} on host \S+, since 20\d\d-"
        for _ in range(2):  # The one that is refused leaves the words of the first.
            with pytest.raises(UserError, match=told):
                train_command([f"--config={path}", f"--workdir={run}"])
        asked = iter([True, False])
        with pytest.raises(UserError, match=told), only_writer(run, waits=asked.__next__):
            pass
        assert not list(asked)
        assert (run / METRICS).read_bytes() == before
    finally:
        process.kill()
        process.communicate()
    with only_writer(run):  # Killed, it holds nothing.
        assert f"process {os.getpid()} on host" in (run / "lock").read_text()
        with pytest.raises(UserError, match=f"process {os.getpid()} "), only_writer(run):
            pass


def test_a_file_system_without_locks_is_told(run, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("mbn_jax.training.workdir.fcntl.flock", no_locks)
    with only_writer(run):
        assert "cannot be locked (Function not implemented)" in caplog.text


def with_stored(run, **values):
    stored = json.loads((run / CONFIG).read_text())
    for name, value in values.items():
        *groups, field = name.split(".")
        tree = stored
        for group in groups:
            tree = tree[group]
        tree[field] = value
    (run / CONFIG).write_text(json.dumps(stored))


def test_a_field_that_was_removed_is_accepted_where_it_changed_nothing(run, config):
    with_stored(run, runtime="pmap")
    assert fields(load_config(run)) == fields(config)
    assert evaluate_run(run)["step"] == 8
    train(config, run, programs=ONE_DEVICE)
    with_stored(run, runtime="shard_map")
    with pytest.raises(
        UserError, match=r"config\.json has runtime='shard_map'.*no longer supports"
    ):
        evaluate_run(run)


def test_fields_that_never_were_are_refused(run):
    with_stored(run, colour="red")
    with pytest.raises(
        UserError, match=r"config\.json is damaged, or of another .* unknown fields colour"
    ):
        load_config(run)


def test_a_value_of_another_type_is_refused(run):
    with_stored(run, num_epochs=None)
    with pytest.raises(UserError, match=r"damaged: num_epochs must be like 10\.0, got null"):
        load_config(run)


@pytest.mark.slow
def test_a_run_resumes_with_another_record_but_not_with_another_training(run, config, data_dir):
    assert set(MAY_CHANGE) <= set(fields(config))
    moved = shutil.copytree(data_dir, run.parent / "moved")
    other = changed(
        config,
        log_every_steps=1,
        eval_every_steps=3,
        checkpoint_every_steps=5,
        keep_checkpoints=7,
        shift__every_steps=4,
        dataset__data_dir=str(moved),
        recalibrate_batches=1,
    )
    shutil.rmtree(run / CHECKPOINTS / "8")
    before = read_metrics(run)
    train(other, run, programs=ONE_DEVICE)
    assert fields(load_config(run)) == fields(other)
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == [2, 4, 5, 6, 7, 8]
    last = read_metrics(run)[-1]
    for name in ("test_error", "test_loss"):  # The same network.
        assert last[name] == pytest.approx(before[-1][name], rel=1e-6)
    for field, value in (
        ("batch_size", 8),
        ("norm.decay", 0.5),
        ("seed", 1),
        ("shift.examples", 16),  # Of these three, what a recorded number means.
        ("shift.layers", "_0"),
        ("eval_batch_size", 64),
    ):
        with pytest.raises(UserError, match=rf"another config \({field} was .* and is {value!r}\)"):
            train(with_fields(other, {field: value}, "the test"), run, programs=ONE_DEVICE)


@pytest.mark.slow
def test_a_finished_run_is_lengthened_to_that_which_it_would_have_been(run, config, tmp_path):
    longer = changed(config, num_epochs=3.0)
    assert train(longer, run, programs=ONE_DEVICE)["step"] == 12
    train(longer, tmp_path / "whole", programs=ONE_DEVICE)
    assert_same_bits(final_state(longer, run), final_state(longer, tmp_path / "whole"))
    assert evaluate_run(run)["step"] == 12
    with pytest.raises(UserError, match=r"another config \(num_epochs was 3.0 and is 2.0\)"):
        train(config, run, programs=ONE_DEVICE)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"schedule.name": "cosine"}, "schedule.name='cosine'"),
        ({"norm.name": "batch_renorm"}, "norm.batch_renorm"),
        ({"norm.memory_schedule.start_size": 2}, "norm.memory_schedule"),
    ],
)
def test_a_run_that_goes_by_its_end_is_not_lengthened(config, tmp_path, values, cause):
    config = with_fields(config, values, "the test")
    (tmp_path / CONFIG).write_text(config.to_json())
    with pytest.raises(UserError, match=rf"cannot be lengthened to 3.0: {cause} depends on the en"):
        train(changed(config, num_epochs=3.0), tmp_path, programs=ONE_DEVICE)


@pytest.mark.slow
def test_a_run_starts_with_the_weights_of_another(finished, config, tmp_path):
    """At a rate that moves nothing, the weights are those, whatever the optimizer."""
    other = changed(
        config,
        init_from=str(finished),
        optimizer__name="adam",
        optimizer__learning_rate=1e-30,
        num_epochs=0.25,
        seed=1,
    )
    values = train(other, tmp_path / "run", programs=ONE_DEVICE)
    assert values["step"] == 1
    found, source = final_state(other, tmp_path / "run"), final_state(config, finished)
    assert_same_bits(found.params, source.params)
    assert jax.random.key_data(found.key).tolist() != jax.random.key_data(source.key).tolist()
    layer = "MemorizedBatchNorm_0"
    filled = [np.count_nonzero(s.batch_stats[layer]["count"][0, :, 0]) for s in (source, found)]
    assert filled == [8, 9]
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)  # Once it has begun, it needs the other no more.
    for values, told in (
        ({"model__features": (5,)}, r"has shape \(.*4\) there, expected \(.*5\)"),
        ({"norm__memory_size": 8}, r"has shape \(64, 4\) there, expected \(8, 4\)"),
        ({"norm__name": "batch"}, "other normalization layers"),
        ({"init_from": str(tmp_path / "none")}, "none has no valid checkpoint"),
    ):
        with pytest.raises(UserError, match=f"init_from=.*{told}"):
            train(changed(other, **values), tmp_path / "other", programs=ONE_DEVICE)
        shutil.rmtree(tmp_path / "other")


def test_weights_that_the_new_model_has_no_place_for_are_refused(finished, config):
    """A layer without statistics may be the only difference."""
    state = jax.tree.map(lambda x: x[0], final_state(config, finished))
    with_weights_of(str(finished), state)
    params = {name: layer for name, layer in state.params.items() if name != "Dense_0"}
    with pytest.raises(UserError, match=r"Dense_0.* has shape \(.*\) there, expected none"):
        with_weights_of(str(finished), state.replace(params=params))


GROWING = {"norm.memory_schedule.start_size": 2, "norm.memory_schedule.end": 0.5}


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        (GROWING, {}),
        ({}, GROWING),
        (GROWING, {"norm.memory_schedule.start_size": 0, "norm.decay": 0.5}),
        ({"norm.name": "batch_renorm"}, {}),
        ({"norm.name": "batch"}, {"norm.name": "memorized"}),
        ({"norm.name": "batch"}, {"norm.name": "memorized", "norm.memory_size": 0}),
        ({"norm.name": "batch"}, {"norm.name": "batch_renorm"}),
    ],
)
@pytest.mark.slow
def test_a_run_that_starts_from_another_begins_its_schedules_anew(
    config, tmp_path, values, changes
):
    config = with_fields(config, values, "the test")
    train(config, tmp_path / "run", programs=ONE_DEVICE)
    start = first_device(final_state(config, tmp_path / "run"))
    config = with_fields(config, changes, "the test")
    fresh = ONE_DEVICE.get(config).init_state(config)
    state = with_weights_of(str(tmp_path / "run"), fresh)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for module in ("Conv_0", "Dense_0"):  # The norm may have another name.
        assert_same_bits(*(jax.device_get(s.params[module]) for s in (state, start)))
    (layer,) = jax.device_get(layers_with_statistics(state.batch_stats)).values()
    (expected,) = layers_with_statistics(jax.device_get(fresh.batch_stats)).values()
    for name in {"steps", "rule"} & layer.keys():
        assert_same_bits(layer[name], expected[name])
    (old,) = layers_with_statistics(start.batch_stats).values()
    if values.get("norm.name") == "batch":
        for found, moments in zip(
            inference_statistics(layer), (old["mean"], old["var"]), strict=True
        ):
            np.testing.assert_allclose(found, moments, rtol=1e-6)
    else:
        assert_same_bits(
            {k: layer[k] for k in ("mean", "var")}, {k: old[k] for k in ("mean", "var")}
        )


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_evaluated(config, tmp_path):
    state = replicate(small_state(), ONE_DEVICE.devices)
    checkpoints = Checkpoints(tmp_path / "kept", keep=2, keep_best=True)
    errors = {10: 0.3, 20: 0.1, 25: None, 30: 0.1, 40: 0.2, 50: 0.4, 60: 0.3}
    for step, error in errors.items():
        state = state.replace(step=jnp.full_like(state.step, step))
        notes = {"test_error": error}
        temporary = error is None
        checkpoints.save(state, local_statistics=False, notes=notes, temporary=temporary)
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "kept").iterdir()) == [30, 50, 60]
    checkpoints = Checkpoints(tmp_path / "kept")
    best = checkpoints.restore(small_state(), local_statistics=False, best=True)
    assert int(first_device(best.step)) == 30
    checkpoints.close()

    config = changed(config, keep_best=True, keep_checkpoints=1, optimizer__learning_rate=0.2)
    # No evaluation but the last would be due where a checkpoint is.
    config = changed(config, checkpoint_every_steps=2, eval_every_steps=3)
    train(config, tmp_path / "run", programs=ONE_DEVICE)
    errors = {
        r["step"]: r["test_error"] for r in read_metrics(tmp_path / "run") if "test_error" in r
    }
    assert sorted(errors) == [2, 3, 4, 6, 8]
    best = min(errors.keys() - {3}, key=lambda step: (errors[step], -step))
    evaluated = evaluate_run(tmp_path / "run", best=True)
    assert evaluated["step"] == best
    assert evaluated["error"] == errors[best]


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_checkpoints_of_another_interval_are_kept_like_all(tmp_path):
    """Which one is temporary is not told by its step: the interval may change on the way."""
    state = replicate(small_state(), ONE_DEVICE.devices)
    for interval, steps in ((10, (10, 20, 24, 30)), (7, (35, 42))):
        checkpoints = Checkpoints(tmp_path, keep=4)
        for step in steps:
            state = state.replace(step=jnp.full_like(state.step, step))
            is_temporary = step % interval != 0
            checkpoints.save(state, local_statistics=False, temporary=is_temporary)
        checkpoints.close()
    assert kept(tmp_path) == [20, 30, 35, 42]


@pytest.mark.slow
def test_a_run_that_resumes_between_dispatches_misses_nothing_that_is_due(config, tmp_path):
    """Lengthened from step 5, or with another `steps_per_dispatch`."""
    config = changed(config, steps_per_dispatch=4, log_every_steps=4, eval_every_steps=8)
    config = changed(config, checkpoint_every_steps=4, num_epochs=1.25)
    assert train(config, tmp_path, programs=ONE_DEVICE)["step"] == 5
    config = changed(config, num_epochs=4.5)

    def stop_asked(first, last):
        return last == 12

    with pytest.raises(StoppedError):
        train(config, tmp_path, programs=ONE_DEVICE, stop_asked=stop_asked)
    config = changed(config, steps_per_dispatch=3, log_every_steps=3, eval_every_steps=9)
    config = changed(config, checkpoint_every_steps=9, shift__every_steps=9, num_epochs=5.0)
    train(config, tmp_path, programs=ONE_DEVICE)
    evaluated = {r["step"]: "test_error" in r for r in read_metrics(tmp_path)}
    no, yes = False, True
    assert evaluated == {4: no, 5: yes, 8: yes, 12: no, 15: no, 18: yes, 20: yes}
    assert kept(tmp_path / CHECKPOINTS) == [12, 18, 20]
    # The batches are the same: one step after the other gives the same network, but for rounding.
    single = changed(config, steps_per_dispatch=1)
    train(single, tmp_path / "single", programs=ONE_DEVICE)
    found = (final_state(single, folder).params for folder in (tmp_path, tmp_path / "single"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), *found)


def small_state(impl=None):
    tx = optax.sgd(0.1, momentum=0.9)
    variables = {"params": {"kernel": jnp.ones((2, 3))}, "batch_stats": {"mean": jnp.ones((4, 3))}}
    return TrainState.create(variables, tx, jax.random.key(7, impl=impl))


IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


@pytest.mark.parametrize("saved", IMPLEMENTATIONS)
def test_a_key_is_restored_as_it_was_saved_whatever_the_default_is(tmp_path, saved):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(replicate(small_state(saved)), local_statistics=False)
    for now in IMPLEMENTATIONS:
        with jax.default_prng_impl(now):
            found = first_device(checkpoints.restore(small_state(), local_statistics=False))
        assert str(jax.random.key_impl(found.key)) == saved
        states = (found, small_state(saved))
        assert_same_bits(*(s.replace(key=jax.random.key_data(s.key)) for s in states))
    checkpoints.close()


@pytest.mark.slow
def test_a_run_resumes_and_evaluates_under_another_random_implementation(run, config, tmp_path):
    longer = changed(config, num_epochs=3.0)
    with jax.default_prng_impl("rbg"):
        programs = Programs(jax.devices()[:1])  # Compiled with the other default.
        assert evaluate_run(run)["error"] == read_metrics(run)[-1]["test_error"]
        train(longer, run, programs=programs)
    train(longer, tmp_path / "whole", programs=ONE_DEVICE)
    assert_same_bits(final_state(longer, run), final_state(longer, tmp_path / "whole"))


def test_records_that_are_not_finite_are_json_and_come_back(tmp_path):
    values = {"train_loss": math.nan, "test_loss": math.inf, "shift": -math.inf, "error": 0.5}
    reporter = Reporter(tmp_path, first_step=0, total_steps=2, on_record=lambda *_: None)
    reporter.write(1, values)
    digest = reporter.sync()
    reporter.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    np.testing.assert_equal(read_metrics(tmp_path), [{"step": 1, **values}])
    check_records(tmp_path, 1, digest)
    # As older versions wrote it.
    (tmp_path / METRICS).write_text('{"step": 1, "train_loss": NaN}\n')
    assert math.isnan(read_metrics(tmp_path)[0]["train_loss"])


@pytest.mark.slow
def test_what_asyncio_says_late_of_a_full_disk_is_silent(caplog):
    async def fail(error):
        raise error

    def leave_unretrieved(error):
        loop = asyncio.new_event_loop()
        task = loop.create_task(fail(error))
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()
        del task
        gc.collect()

    full = "Error writing local file [os_error_code='28']"
    with pytest.raises(OSError, match="Error writing") as error, disk_errors():
        raise ValueError(full)
    assert error.value.errno == 28
    leave_unretrieved(ValueError(full))
    leave_unretrieved(OSError(28, "No space left on device"))
    assert "never retrieved" not in caplog.text
    leave_unretrieved(ValueError("something else"))
    assert "something else" in caplog.text


def test_a_save_that_fails_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    """Other threads of a sweep save at the same time."""
    checkpoints = Checkpoints(tmp_path)

    def fail(*_, **__):
        assert (sys.unraisablehook, filters()) == before
        raise ValueError("Error writing local file [os_error_code='28']")

    def filters():
        return [list(logging.getLogger(name).filters) for name in ("absl", "asyncio")]

    before = sys.unraisablehook, filters()
    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(OSError, match="Error writing"):
        checkpoints.save(replicate(small_state()), local_statistics=False)
    checkpoints.close()
    assert (sys.unraisablehook, filters()) == before


@pytest.mark.slow
def test_platforms_that_are_not_there_are_told():
    program = "from mbn_jax.main import eval_main; eval_main()"
    for platform in ("cuda", "nonsense"):
        told = subprocess.run(
            [sys.executable, "-c", program, "--workdir=nowhere"],
            env=os.environ | {"JAX_PLATFORMS": platform},
            capture_output=True,
            text=True,
        )
        assert told.returncode == ExitStatus.USER_MISTAKE
        assert told.stderr.startswith(
            f"mbn-eval: JAX finds no devices for JAX_PLATFORMS={platform!r}"
        )
        assert told.stderr.count("\n") == 1
