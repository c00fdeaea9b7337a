"""The main job end to end: on real digits, interrupted, damaged, on one device and eight."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import assert_same_bits, forty_steps, records, write_config, xla_flags

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import replicate
from mbn_jax.training import passes
from mbn_jax.training import program as program_module
from mbn_jax.training import steps as steps_module
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.divergence import DivergenceError
from mbn_jax.training.evaluation import evaluate_run
from mbn_jax.training.hparams import HParams
from mbn_jax.training.loop import run_title
from mbn_jax.training.loop import train as train_anew
from mbn_jax.training.overview import overview
from mbn_jax.training.passes import evaluate, input_moments
from mbn_jax.training.program import Programs
from mbn_jax.training.steps import BatchStack, build_train_step
from mbn_jax.training.task import Task
from mbn_jax.training.workdir import CHECKPOINTS

pytestmark = pytest.mark.slow

TIMES = {"images_per_second"}
PROGRAMS = Programs()
"""Of all tests: compiling takes longer than running."""

train = functools.partial(train_anew, programs=PROGRAMS)
final_state = functools.partial(runs.final_state, PROGRAMS)


@pytest.fixture
def config(data_dir):
    fields = {"model.features": (8, 8), "log_every_steps": 4, "eval_every_steps": 20}
    return forty_steps(data_dir, **fields)


def kill_after(monkeypatch, saves):
    """Interrupts training right after so many checkpoints."""
    save, count = Checkpoints.save, [0]

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        count[0] += 1
        if count[0] == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)


def test_a_run_learns_and_leaves_all_that_it_promises(config, tmp_path):
    config.num_epochs = 4.0
    config.dataset.crop_padding = 0
    config.model.features = (16, 32)
    values = train(config, tmp_path)
    # Ten classes: chance is an error of 0.9.
    assert values["test_error"] < 0.4
    assert values["step"] == 160
    assert values == train(config, tmp_path)  # Again: nothing left to do
    assert json.loads((tmp_path / "config.json").read_text())["norm"]["memory_size"] == 64
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    evaluated = [r["step"] for r in records(tmp_path) if "test_error" in r]
    assert evaluated == list(range(20, 161, 20))
    events = b"".join(f.read_bytes() for f in tmp_path.glob("events.out.tfevents.*"))
    for tag in (b"train_loss", b"test_error"):
        assert tag in events
    assert evaluate_run(tmp_path) == {
        "step": 160,
        "split": "test[:100]",
        "examples": 100,
        "loss": pytest.approx(values["test_loss"], rel=1e-6),
        "error": values["test_error"],
    }


def test_evaluation_is_exact(config, tmp_path):
    config.num_epochs = 0.5
    config.eval_batch_size = 24
    train(config, tmp_path)
    task = Task.build(config)
    state = jax.tree.map(lambda x: x[0], final_state(config, tmp_path))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = task.standardized(jnp.asarray(task.test.in_memory["image"]))
    logits = task.model(HParams.from_config(config)).apply(variables, images, train=False)
    wrong = int((logits.argmax(-1) != task.test.in_memory["label"]).sum())
    assert evaluate_run(tmp_path)["error"] == wrong / 100


@pytest.mark.parametrize("sync", ["sync", "local"])
def test_an_interrupted_run_resumes_bit_for_bit(config, tmp_path, monkeypatch, sync):
    config.norm.sync = sync
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, saves=2)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed")
    # As if the kill had come in the middle of writing a line.
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 24, "train_lo')
    train(config, tmp_path / "killed")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert_same_bits(*(final_state(config, tmp_path / name) for name in ("killed", "whole")))


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "unfinished"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    config, tmp_path, monkeypatch, caplog, damage
):
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, saves=3)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "damaged")
    newest = tmp_path / "damaged" / CHECKPOINTS / "30"
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "truncated":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        largest.unlink()
    else:
        (newest / "checksums.json").unlink()
    caplog.set_level("WARNING", logger="absl")
    train(config, tmp_path / "damaged")
    assert "Skipped the checkpoint of step 30" in caplog.text
    assert records(tmp_path / "damaged") == records(tmp_path / "whole")
    assert_same_bits(*(final_state(config, tmp_path / name) for name in ("damaged", "whole")))


def test_several_steps_per_dispatch_change_nothing(config, tmp_path):
    config.log_every_steps = 20
    config.checkpoint_every_steps = 20
    train(config, tmp_path / "single")
    config.steps_per_dispatch = 5
    train(config, tmp_path / "stacked")
    single, stacked = (final_state(config, tmp_path / name) for name in ("single", "stacked"))
    # The same steps, compiled as a loop body: rounding alone may differ, over 40 steps.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3),
        (single.params, single.batch_stats),
        (stacked.params, stacked.batch_stats),
    )


def test_one_compilation_of_the_step_in_a_run(config, tmp_path):
    config.steps_per_dispatch = 4
    config.num_epochs = 1.05  # 42 steps: the last stack has 2.
    config.checkpoint_every_steps = 20
    programs = Programs()
    train_anew(config, tmp_path, programs=programs)
    assert programs.step_compilations == 2


def test_local_statistics_start_from_their_pool_on_other_devices(config, tmp_path):
    config.norm.sync = "local"
    train(config, tmp_path)
    stacked = final_state(config, tmp_path)
    means = stacked.batch_stats["MemorizedBatchNorm_0"]["mean"]
    assert len({mean.tobytes() for mean in means}) == jax.local_device_count()
    # Restored for synced devices, every device holds the pool.
    config.norm.sync = "sync"
    pooled = final_state(config, tmp_path).batch_stats
    expected = replicate(pool_batch_stats(jax.tree.map(jnp.asarray, stacked.batch_stats)))
    assert_same_bits(pooled, jax.device_get(expected))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_other_norms(config, tmp_path, norm):
    config.norm.name = norm
    config.num_epochs = 0.5
    assert np.isfinite(train(config, tmp_path)["test_loss"])


def test_divergence_stops_the_run_and_names_the_step(config, tmp_path):
    config.norm.name = "none"
    config.optimizer.learning_rate = 1e12
    with pytest.raises(DivergenceError, match=r"The loss of step \d+ is .* at learning rate") as e:
        train(config, tmp_path)
    assert 1 < e.value.step <= 12
    assert all(np.isfinite(r["train_loss"]) for r in records(tmp_path))


def test_divergence_in_the_last_step_is_noticed(config, tmp_path):
    config.num_epochs = 0.03  # One step: its loss is from before the update.
    config.optimizer.learning_rate = 1e38
    with pytest.raises(DivergenceError, match="after step 1 is") as error:
        train(config, tmp_path)
    assert error.value.step == 1
    assert pickle.loads(pickle.dumps(error.value)).step == 1
    assert not list((tmp_path / CHECKPOINTS).glob("[0-9]*"))


def test_a_run_without_its_records_says_how_to_evaluate_it(config, tmp_path):
    config.num_epochs = 0.1
    train(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert train(config, tmp_path) == {}


def test_a_workdir_from_before_a_field_existed_is_that_of_its_default(config, tmp_path):
    config.num_epochs = 0.1
    values = train(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["norm"]["gradient"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert train(config, tmp_path) == values
    assert evaluate_run(tmp_path)["error"] == values["test_error"]
    config.norm.gradient = "renorm"
    with pytest.raises(UserError, match=r"norm\.gradient was 'auto' and is 'renorm'"):
        train(config, tmp_path)


def test_a_workdir_of_another_config_is_refused(config, tmp_path):
    config.num_epochs = 0.5
    train(config, tmp_path)
    config.norm.memory_size = 8
    with pytest.raises(UserError, match=r"norm\.memory_size was 64 and is 8"):
        train(config, tmp_path)


def test_bfloat16_computes_in_it_and_keeps_float32_state(config):
    config.model.dtype = "bfloat16"
    program = Programs().get(config)
    state = program.init_state(config)
    kept = jax.tree.leaves((state.params, state.batch_stats))
    assert {x.dtype for x in kept} == {jnp.dtype("float32")}
    stack = replicate(BatchStack(np.int32(0), np.zeros((4, 2), np.int32)))
    args = (replicate(state), program.hparams(config), program.data(program.task.train), stack)
    step = program.compiled(steps_module.train_steps, num_steps=1)
    assert "bf16[" in str(jax.make_jaxpr(step)(*args))
    new = jax.eval_shape(step, *args)[0]
    kept = jax.tree.leaves((new.params, new.batch_stats))
    assert {x.dtype for x in kept} == {jnp.dtype("float32")}


def test_fields_of_the_second_forward_reach_the_step(config, monkeypatch):
    fields = {"double_forward": "transport", "double_forward_fraction": 0.5}
    config.update_from_flattened_dict(fields)
    found = {}
    monkeypatch.setattr(steps_module, "make_train_step", lambda *_, **kw: found.update(kw))
    build_train_step(Task.build(config), HParams.from_config(config))
    assert found.items() >= fields.items()
    assert "transport of 0.5 of the batch" in run_title(config)


def test_programs_are_dropped_before_memory_maps_run_out(config, monkeypatch):
    other = with_fields(config, {"norm.epsilon": 1e-3}, "the test")
    for share, kept in ((1e9, True), (0.0, False)):
        programs = Programs()
        monkeypatch.setattr(program_module, "MAX_SHARE_OF_MEMORY_MAPS", share)
        first = programs.get(config)
        assert programs.get(config) is first  # It compiles nothing, and drops nothing.
        programs.get(other)
        assert (programs.get(config) is first) == kept


TWO_DEVICES = Programs(jax.devices()[:2])
MEMORIES = {
    "transport": {"double_forward": "transport", "norm.virtual_batch_size": 8},
    "endless": {
        "double_forward": "transport",
        "double_forward_fraction": 0.5,
        "norm.memory_size": 0,
        "norm.sync": "local",
    },
    "growing": {"norm.memory_schedule.start_size": 4, "norm.memory_schedule.end": 0.5},
    "batch": {"norm.virtual_batch_size": 2, "norm.name": "batch", "norm.sync": "local"},
}


@pytest.mark.parametrize("fields", MEMORIES.values(), ids=MEMORIES)
def test_whatever_memory_there_is_is_saved_evaluated_and_recalibrated(
    config, tmp_path, monkeypatch, fields
):
    config = with_fields(config, fields, "the test")
    config.recalibrate_batches = 2
    config.eval_batch_size = 320
    values = train(config, tmp_path / "whole", programs=TWO_DEVICES)
    with monkeypatch.context() as patch:
        kill_after(patch, saves=2)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed", programs=TWO_DEVICES)
    assert train(config, tmp_path / "killed", programs=TWO_DEVICES) == values
    states = []
    for name in ("whole", "killed"):
        checkpoints = Checkpoints(tmp_path / name / CHECKPOINTS)
        program = TWO_DEVICES.get(config)
        state = checkpoints.restore(
            program.init_state(config),
            local_statistics=program.task.local_statistics,
            devices=TWO_DEVICES.devices,
        )
        checkpoints.close()
        states.append(jax.device_get(state.replace(key=jax.random.key_data(state.key))))
    assert_same_bits(*states)
    assert values["recalibrated_test_loss"] != values["test_loss"]


def test_a_run_is_recalibrated_after_it_too(config, tmp_path):
    config.recalibrate_batches = 2  # Of 320: all of the training split.
    config.eval_batch_size = 320
    values = train(config, tmp_path)
    assert evaluate_run(tmp_path)["error"] == values["test_error"]
    recalibrated = evaluate_run(tmp_path, recalibrate_batches=2)
    assert recalibrated["error"] == values["recalibrated_test_error"]
    assert recalibrated["loss"] == pytest.approx(values["recalibrated_test_loss"], rel=1e-6)


def test_a_network_that_keeps_less_is_trained_measured_and_recalibrated(config, tmp_path):
    values = {}
    config.recalibrate_batches = 1
    config.shift.every_steps = config.log_every_steps
    for remat in (False, True):
        config.model.remat = remat
        values[remat] = train_anew(config, tmp_path / str(remat))
    # The same arithmetic, in another order.
    assert values[True] == pytest.approx(values[False], rel=1e-2)


def test_virtual_batches_of_each_device_start_from_the_pool_on_fewer_devices(config, tmp_path):
    config.norm.sync = "local"
    config.norm.virtual_batch_size = 2
    config.num_epochs = 0.5
    train_anew(config, tmp_path, programs=Programs(jax.devices()[:4]))
    config.batch_size = 16  # On two devices: four groups each, where it was two.
    ends = []
    for count in (4, 2):
        devices = jax.devices()[:count]
        program = Programs(devices).get(config)
        checkpoints = Checkpoints(tmp_path / CHECKPOINTS)
        state = checkpoints.restore(
            program.init_state(config), local_statistics=True, devices=devices
        )
        checkpoints.close()
        counts = state.batch_stats["VirtualBatches_0"]["count"]
        assert counts.shape[:2] == (count, 8 // count)
        ends.append(evaluate(program, config, state))
    # All groups pooled, in one step or in two; float32.
    assert ends[0]["error"] == ends[1]["error"]
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-5)


def test_an_evaluation_that_misses_an_example_is_an_error(config, monkeypatch):
    def without_the_first(*args, **options):
        for number, batch in enumerate(batches(*args, **options)):
            mask = batch.mask & ((np.arange(len(batch.mask)) > 0) | (number > 0))
            yield batch._replace(mask=mask)

    batches = passes.evaluation_batches
    program = PROGRAMS.get(config)
    state = replicate(program.init_state(config))
    assert evaluate(program, config, state)["error"] <= 1
    monkeypatch.setattr(passes, "evaluation_batches", without_the_first)
    with pytest.raises(RuntimeError, match="Evaluated 99 of the 100 examples of 'test"):
        evaluate(program, config, state)


OVERVIEW = {
    (1, 8, "sync"): ["8 devices (cpu); batch size 64: 8 on each device", "64 .* all devices share"],
    (4, 8, "local"): [
        "4 hosts with 2 devices each (cpu); batch size 64: 16 on each host, 8 on each device",
        "statistics of 8 examples a batch: each of 8 devices keeps its own",
    ],
    (4, 8, "group"): [
        "4 hosts",
        "16 examples a batch: each of 4 groups of 2 devices keeps its own",
    ],
    (1, 1, "sync"): ["1 device (cpu)", "64 examples a batch: one device has them"],
}


@pytest.mark.parametrize(("hosts", "devices", "sync"), OVERVIEW)
def test_the_overview_says_how_a_batch_is_spread(config, monkeypatch, hosts, devices, sync):
    config.batch_size = 64
    config.norm.sync, config.norm.sync_group_size = sync, 2
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    task = Task.build(config, num_devices=devices)
    where, statistics, data = overview(task, config)
    expected = OVERVIEW[hosts, devices, sync]
    assert expected[0] in where
    assert re.search(expected[1], statistics)
    assert data.startswith("train on 640 examples of 'train[:640]' (in memory), evaluate on 100 ")
    assert data.endswith("10 steps an epoch, 10 in all")
    config.norm.name = "group"  # Of no batch.
    assert overview(task, config) == [where, data]


def test_a_run_is_evaluated_on_the_devices_that_it_fits(config, tmp_path):
    config.batch_size = 12
    config.num_epochs = 0.2
    config.norm.virtual_batch_size = 3
    config.norm.sync = "local"
    values = train_anew(config, tmp_path, programs=Programs(jax.devices()[:4]))
    assert evaluate_run(tmp_path)["error"] == values["test_error"]


def test_recalibration_is_by_the_moments_of_the_training_images(config, tmp_path):
    config.num_epochs = 0.5
    config.dataset.crop_padding = 0
    config.eval_batch_size = 640
    config.model.features = (4,)
    train(config, tmp_path)
    program = PROGRAMS.get(config)
    state = jax.tree.map(lambda x: x[0], final_state(config, tmp_path))
    moments = input_moments(
        program, config, replicate(state.params), replicate(state.batch_stats), 0, recalibrate=True
    )
    images = program.task.standardized(jnp.asarray(program.task.train.in_memory["image"]))
    inputs = jax.lax.conv_general_dilated(
        images,
        state.params["Conv_0"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    inputs = np.asarray(inputs, np.float64).reshape(-1, 4)
    (found,) = (jax.tree.map(lambda x: x[0], m) for m in moments.values())
    # Float32 sums over 41,000 pixels.
    np.testing.assert_allclose(found.mean, inputs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.var, inputs.var(0), rtol=1e-4)
    assert found.count.tolist() == [len(inputs)] * 4


def test_nothing_to_recalibrate_is_said(config, tmp_path):
    config.num_epochs = 0.1
    config.norm.name = "group"
    config.recalibrate_batches = 1
    assert "recalibrated_test_error" not in train(config, tmp_path)
    with pytest.raises(UserError, match=r"keeps no statistics \(norm 'group'\)"):
        evaluate_run(tmp_path, recalibrate_batches=1)


def test_a_held_out_tenth_is_not_trained_on(config, tmp_path):
    config.dataset.train_split = "train"
    config.dataset.validation = True
    config.num_epochs = 0.1
    task = Task.build(config)
    assert (len(task.train), len(task.test)) == (1293, 144)
    train(config, tmp_path)
    assert evaluate_run(tmp_path)["split"] == "train[90%:]"


@pytest.mark.parametrize(
    ("train_split", "test_split", "validation", "refused"),
    [
        ("train", "test", False, None),
        ("train", "test", True, None),
        ("test", "train", True, None),
        ("train[:50%]+test[:50%]", "train[50%:]+test[50%:]", False, None),
        ("train[-300:]", "train[:-300]", False, None),
        ("train+test[:50%]", "test[50%:]", False, None),
        ("train+test", "test", True, "validation divides a whole split, got .*'train.test'"),
        ("train + test", "test", True, "validation divides a whole split"),
        ("all", "test", True, "validation divides a whole split, got .*'all'"),
        ("train[:50%]", "test", True, "validation divides a whole split"),
        ("train+test", "test", False, "must be apart, and share 360 examples"),
        ("all", "test[:10%]", False, "must be apart, and share 36 examples"),
        ("train", "train[90%:]", False, "must be apart, and share 144 examples"),
        ("train[:51%]", "train[50%:]", False, "must be apart, and share 1[45] examples"),
    ],
)
def test_training_and_evaluation_share_no_example(
    config, train_split, test_split, validation, refused
):
    config.dataset.update(train_split=train_split, test_split=test_split, validation=validation)
    if refused:
        with pytest.raises(UserError, match=refused):
            Task.build(config)
        return
    task = Task.build(config)
    # Examples are told apart by their pixels: all 1,797 digits differ.
    digits = [{image.tobytes() for image in x.in_memory["image"]} for x in (task.train, task.test)]
    assert [len(found) for found in digits] == [len(task.train), len(task.test)]
    assert not digits[0] & digits[1]


def test_random_crops_on_the_host_train_alike_by_threads_and_by_processes(config, tmp_path):
    config.dataset.random_resized_crop = True
    config.dataset.image_size = 8
    config.dataset.crop_padding = 0
    config.num_epochs = 0.3
    ends = []
    for workers in (0, 2):
        config.dataset.num_workers = workers
        train(config, tmp_path / str(workers))
        ends.append(final_state(config, tmp_path / str(workers)))
    assert_same_bits(*ends)
    config.dataset.random_resized_crop = False
    train(config, tmp_path / "whole")
    kernels = [
        s.params["Conv_0"]["kernel"] for s in (ends[0], final_state(config, tmp_path / "whole"))
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_one_device_and_eight_give_the_same_run(config, tmp_path):
    config.num_epochs = 0.3
    script = tmp_path / "config.py"
    write_config(config, script)
    # Compiled without optimization, as in this process.
    for devices in (1, 8):
        command = [sys.executable, "-W", "error", "-m", "mbn_jax.main"]
        subprocess.run(
            [*command, f"--config={script}", f"--workdir={tmp_path / str(devices)}"],
            env=os.environ | {"XLA_FLAGS": xla_flags(devices)},
            check=True,
            capture_output=True,
        )
    one, eight = (records(tmp_path / str(devices)) for devices in (1, 8))
    assert [r["step"] for r in one] == [r["step"] for r in eight] == [4, 8, 10, 12]
    for a, b in zip(one, eight, strict=True):
        # Twelve steps of float32 sums in another order.
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
