"""Scripts of experiments/: a step that is compiled and not run, and the table of a sweep."""

import doctest
import math
import pathlib
import sys
import types

import jax
import pandas as pd
import pytest

from mbn_jax.sweeps.command import load_sweep
from mbn_jax.training.config_files import parse_config, with_fields

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments" / "scripts"))

import ceiling_table  # noqa: E402
import live_memory  # noqa: E402
import pod_cost  # noqa: E402
import topologies  # noqa: E402

SPLIT = pod_cost.made_up_split((8, 8, 1), 10, 1000)
LAYERS = 2


@pytest.mark.parametrize(
    ("case", "all_reduces"),
    # Counted with jax 0.10.2 on CPU: docs/guides/hosts.md.
    [("batch, local", 1), ("memory, groups of 4, transport", 3 * LAYERS + 1)],
)
@pytest.mark.slow
def test_a_step_is_compiled_for_all_devices_from_shapes_alone(case, all_reduces):
    config = parse_config(str(ROOT / "configs" / "digits.py"))
    fields = {"model.features": (4, 4), "batch_size": 16}
    config = with_fields(config, fields | pod_cost.CASES[case], "the test")
    found = pod_cost.measure(config, SPLIT, jax.devices())
    assert (found["all-reduces"], found["other collectives"]) == (all_reduces, 0)
    # All gradients, two of three numbers a channel beside them.
    params = 9 * 4 + 9 * 4 * 4 + 4 * 4 + 4 * 10 + 10
    assert params * 4 / 1024 < found["KiB carried"] < params * 8 / 1024
    assert found["FLOPs"] > 0
    # What is alive at once has room in the memory that the compiler asks for.
    assert 0.3 * found["memory"] < found["alive"] <= found["memory"]


def test_a_row_says_whether_the_step_fits():
    found = {"all-reduces": 1, "other collectives": 0, "KiB carried": 2.0}
    found |= {"FLOPs": 6.0, "bytes": 4.0, "memory": 3.0, "needed": 20 * 2**30, "alive": 2.0}
    found |= {"estimate": 2e-3, "compiled in": 1.0}
    base = {**found, "FLOPs": 4.0, "estimate": 1e-3, "alive": 1.0}
    row = pod_cost.row_of("x", found, base, 16)
    assert "| x | 1 + 0 | 2.0 | 1.500 | 1.000 |" in row
    assert "1.000 | 2.000 | 2.000 ms (2.000) | 20.00 GiB (too large) |" in row


def test_an_estimate_leaves_out_the_penalty_of_operations_that_cost_nothing():
    bitcast = 'x = custom-call(y), custom_call_target="ConcatBitcast"\n'
    assert pod_cost.estimated_seconds(-59.97175, 60 * bitcast) == pytest.approx(0.02825)
    assert pod_cost.estimated_seconds(0.02825, "") == 0.02825
    # One operation more than is known to be free: no estimate, rather than a wrong one.
    assert math.isnan(pod_cost.estimated_seconds(-59.97175, 59 * bitcast))


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:12", "h100 takes a multiple of 8 GPUs, got '12'"),
        ("h100:8", r"needs JAX's plugin: pip install '\.\[train,cuda\]'"),
        ("v5e:2x4", r"needs libtpu: pip install '\.\[train,tpu\]'"),
    ],
)
def test_a_topology_that_nothing_here_describes_is_refused(topology, message, monkeypatch):
    def not_installed(*args, **options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", not_installed)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=message):
        topologies.topology_devices(topology)


def test_a_topology_unknown_to_libtpu_is_refused(monkeypatch):
    def unknown(*args, **options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such chips")

    library = types.SimpleNamespace(__file__="libtpu/__init__.py")
    monkeypatch.setitem(sys.modules, "libtpu", library)
    monkeypatch.setenv("TPU_LIBRARY_PATH", "")
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", unknown)
    with pytest.raises(ValueError, match=r"describe the topology 'v9:2x2' \(.*no such chips"):
        topologies.topology_devices("v9:2x2")


def test_a_row_leaves_out_what_the_compiler_does_not_say():
    found = {
        "all-reduces": 4,
        "other collectives": 0,
        "KiB carried": 2.0,
        "memory": 3.0,
        "alive": 2.0,
    }
    found |= {"FLOPs": math.nan, "bytes": math.nan, "estimate": math.nan, "needed": 2**30}
    row = pod_cost.row_of("x", found | {"compiled in": 1.0}, found, 80)
    assert row == "| x | 4 + 0 | 2.0 |  |  | 1.000 | 1.000 |  | 1.00 GiB (fits) | 1 s |"


def test_the_table_has_mean_and_interval_of_each_setting(tmp_path):
    errors = {
        f"{norm}, {kernels}": (0.5, 0.52)
        for kernels in ("plain", "standardized")
        for norm in (
            "group",
            "batch 32",
            *(f"{x} {n}" for x in ceiling_table.LINES for n in (2, 4)),
        )
    }
    errors["batch 32, plain"] = (0.4, 0.42)
    rows = [
        # A norm without statistics has nothing to recompute.
        {"norm": name, "last": True, "test_error": error}
        | ({} if name.startswith("group") else {"recalibrated_test_error": error, "test_error": 0})
        for name, pair in errors.items()
        for error in pair
    ]
    results = pd.DataFrame([*rows, {"norm": "group, plain", "last": False, "test_error": 0.9}])
    table = ceiling_table.summary(results)
    lines = ceiling_table.markdown(table).splitlines()
    # Of two seeds, t is 12.706 and the deviation of the mean half of their distance.
    assert lines[2] == "| group | 51.0 ± 12.7 | 51.0 ± 12.7 |"
    assert lines[3] == "| batch 32 | 41.0 ± 12.7 | 51.0 ± 12.7 |"
    ceiling_table.draw(table, tmp_path / "ceiling.png")
    assert (tmp_path / "ceiling.png").stat().st_size > 10_000


def test_differences_are_paired_by_seed():
    names = {name for pair in ceiling_table.PAIRS for name in pair}
    rows = [
        {"norm": name, "seed": seed, "last": True, "recalibrated_test_error": error + 0.1 * seed}
        for name in sorted(names)
        for seed in (0, 1)
        for error in (0.2 if name == "batch 2, plain" else 0.1,)
    ]
    results = pd.DataFrame(rows).assign(test_error=0.0)
    lines = ceiling_table.differences(results).splitlines()
    # What a seed adds to both cancels.
    assert lines[0] == "batch 2, plain - batch 32, plain: 10.0 ± 0.0"
    assert len(lines) == len(ceiling_table.PAIRS)


def test_the_settings_compared_are_members_of_the_sweep():
    sweep, _ = load_sweep(str(ROOT / "experiments" / "ceiling.py"), [], None)
    assert {name for pair in ceiling_table.PAIRS for name in pair} <= set(sweep.axes["norm"])


@pytest.mark.parametrize("module", [live_memory, pod_cost])
def test_the_examples_in_docstrings_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
