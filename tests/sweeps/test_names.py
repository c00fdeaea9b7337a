"""Names and values that a user may give: of axes, metrics, folders and numbers."""

import re

import numpy as np
import pandas as pd
import pytest

from mbn_jax.errors import UserError
from mbn_jax.main import report_command, sweep_command
from mbn_jax.sweeps import Figure, Sweep
from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.command import load_sweep
from mbn_jax.sweeps.results import AXIS, VALUE, read_results
from mbn_jax.sweeps.runner import with_room

# The tests play the runner.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning"),
]

# Columns of the results, of their summary and of the report's tables, or labels of these.
NAMES = (
    "learning_rate",
    "test_error",
    "test error (%)",
    "mean",
    "interval",
    "std",
    "standard_deviation",
    "seeds",
    "diverged",
    "difference",
    "pairs",
    "value:learning_rate",
    "batch_size",
    "_hidden $x_$",
)


def table_of(text, heading):
    """Returns a table of the report's Markdown, as dicts of texts."""
    section = text.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    assert len(set(head)) == len(head)
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize("axis", ["learning_rate", "test_error", "mean", "batch_size", NAMES[-1]])
def test_an_axis_may_have_the_name_of_a_result(write_sweep, tmp_path, fake_train, axis):
    variants = {"low": {"norm.decay": 0.5}, "high": {"norm.decay": 0.9}}
    if axis == "batch_size":  # A field that its variants set to other values than their names.
        variants = {"low": {"batch_size": 8}, "high": {"batch_size": 16}}
    axes = {axis: variants, **{name: {"only": {}} for name in NAMES if name != axis}}
    figures = f"figures=[Figure(x={axis!r}), Figure(y='learning_rate', lines={axis!r})]"
    extra = f"{figures}, baseline={{{axis!r}: 'low'}}, metrics=('learning_rate', 'test_error')"
    path, workdir = write_sweep(axes, seeds=2, extra=extra), tmp_path / "sweep"
    fake_train["seconds"] = 7.0
    assert sweep_command([path, f"--workdir={workdir}"]) == 0
    files = pd.read_csv(workdir / "results.csv"), pd.read_parquet(workdir / "results.parquet")
    for table in files:
        assert len(set(table.columns)) == len(table.columns)
        assert table[axis].value_counts().to_dict() == {"low": 4, "high": 4}
        for name in NAMES:
            assert name == axis or set(table[name]) == {"only"}
        # An axis has the shorter name, `value:learning_rate`, too.
        assert set(table["value:value:learning_rate"]) == {0.125}
        assert set(table["value:test_error"]) == {0.25}
        assert set(table["value:seconds"]) == {7.0}
        assert set(table["seconds"]) != {7.0}
        if axis == "batch_size":
            sizes = set(zip(table[axis], table["field:batch_size"], strict=True))
            assert sizes == {("low", 8), ("high", 16)}
    text = (workdir / "report.md").read_text()
    for label, shown in (("learning rate", "0.1250 ± 0.0000"), ("test error (%)", "25.00 ± 0.00")):
        low, high = table_of(text, label.capitalize())
        assert [next(iter(row.values())) for row in (low, high)] == ["low", "high"]
        assert (low[label], low["seeds"], high["seeds"]) == (shown, "2", "2")
        assert low["difference"] == "-"
        assert re.fullmatch(r"0\.0+ ± 0\.0+", high["difference"])
    assert text.count("](figures/") == 2
    assert "nothing has measured" not in text


def test_a_metric_may_have_any_name(write_sweep, tmp_path, fake_train):
    names = ["seed", "outcome", "last", "norm.decay", "", "a/b ?#%", "axis", "value:seed"]
    fake_train.update(dict.fromkeys(names, 0.5))
    figures = [Figure(y=name, x="norm.decay") for name in names]
    extra = f"metrics={names!r}, figures={figures!r}"
    path, workdir = write_sweep({"norm.decay": (0.5, 0.9)}, extra=extra), tmp_path / "sweep"
    assert sweep_command([path, f"--workdir={workdir}"]) == 0
    results = read_results(store.open_study(workdir))
    for name in names:
        assert set(results[VALUE, name]) == {0.5}
    assert set(results[AXIS, "norm.decay"]) == {0.5, 0.9}
    table = pd.read_parquet(workdir / "results.parquet")
    assert set(table["seed"]) == {0}
    assert set(table["outcome"]) == {"finished"}
    assert set(table["value:norm.decay"]) == {0.5}
    text = (workdir / "report.md").read_text()
    assert text.count("| 0.5000 |") == 2 * len(names)
    links = re.findall(r"\]\((figures/.*)\)", text)
    assert len(links) == len(names)
    for link in links:
        assert re.fullmatch(r"[\w/.=+-]+", link)
        assert (workdir / link).exists()


def test_what_is_measured_under_the_name_of_a_field_is_no_axis(write_sweep, tmp_path, fake_train):
    fake_train["norm.memory_size"] = 3.0
    path = write_sweep({"size": {"a": {"norm.memory_size": 2}, "b": {"norm.memory_size": 4}}})
    assert sweep_command([path, f"--workdir={tmp_path / 'sweep'}"]) == 0
    table = pd.read_csv(tmp_path / "sweep" / "results.csv")
    assert set(zip(table["size"], table["norm.memory_size"], strict=True)) == {("a", 2), ("b", 4)}
    assert set(table["value:norm.memory_size"]) == {3.0}


@pytest.mark.parametrize("values", ["np.logspace(-2, -1, 3)", "np.float32([0.25, 0.5])"])
def test_an_axis_may_be_an_array(write_sweep, tmp_path, fake_train, values):
    path = write_sweep({"optimizer.learning_rate": (0.25,)})
    extra = f"baseline={{'optimizer.learning_rate': {values}[0]}}, seeds=np.int64(2)"
    text = (tmp_path / "experiment.py").read_text().replace("(0.25,)", values)
    (tmp_path / "experiment.py").write_text(text.replace("seeds=1, ", extra))
    assert sweep_command([path, f"--workdir={tmp_path / 'sweep'}"]) == 0
    table = pd.read_csv(tmp_path / "sweep" / "results.csv")
    expected = {float(value) for value in eval(values)}
    assert set(table["optimizer.learning_rate"]) == expected
    # Nothing is run again.
    assert sweep_command([path, f"--workdir={tmp_path / 'sweep'}"]) == 0


def test_numbers_of_numpy_anywhere_in_a_declaration():
    sweep = Sweep(
        title="",
        configs={"digits": "x"},
        axes={
            "norm.memory_size": np.array([1, 2]),
            "batch_size": [np.int64(4), 8],
            "dataset.flip": (np.bool_(True),),
            "wide": {np.int64(2): {"model.features": (np.int64(4), 4)}},
        },
        fields={"num_epochs": np.float64(2)},
        baseline={"batch_size": np.int64(4)},
        figures=[
            Figure(
                x="norm.memory_size",
                lines="batch_size",
                fixed={"wide": np.int64(2)},
            )
        ],
    )
    member = sweep.members()[0]
    assert member.name == (
        '{"norm.memory_size": 1, "batch_size": 4, "dataset.flip": true, "wide": 2, "seed": 0}'
    )
    values = [*member.fields.values(), *member.fields["model.features"], *sweep.fields.values()]
    values += [*sweep.baseline.values(), *sweep.figures[0].fixed.values()]
    assert {type(value) for value in values} == {int, float, bool, tuple}


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ((1, 1.0), "has a value twice"),
        ((0, False), "has a value twice"),
        (("1", 1), "has a value twice"),
        ({1: {}, "1": {}}, "has a value twice"),
        ((0.5, float("nan")), "finite values, got nan"),
        ({(1, 2): {}}, r"got \(1, 2\) of tuple"),
        ("batch", "a tuple, a list or an array of values.*got 'batch'"),
        ({1, 2}, "a tuple, a list or an array of values"),
        (3, "a tuple, a list or an array of values"),
        (np.array(3), "a tuple, a list or an array of values"),
        (np.ones((2, 2)), "numbers, texts and booleans.*of list"),
        ({"a": {"seed": 3}}, "set the field seed"),
    ],
)
def test_values_that_cannot_be_told_apart_or_used(axis, message):
    with pytest.raises(UserError, match=message):
        Sweep(title="", configs={"digits": "x"}, axes={"norm.name": axis})


@pytest.mark.usefixtures("fake_train")
@pytest.mark.parametrize("name", ["a?mode=memory", "a%20b", "a#b {c} é"])
def test_a_folder_may_have_any_name(write_sweep, tmp_path, name):
    for decay, workdir in ((0.7, tmp_path / "a"), (0.5, tmp_path / name)):
        path = write_sweep({"norm.decay": (decay,)})
        assert sweep_command([path, f"--workdir={workdir}"]) == 0
    for decay, workdir in ((0.7, tmp_path / "a"), (0.5, tmp_path / name)):
        assert report_command([str(workdir)]) == 0
        assert set(pd.read_csv(workdir / "results.csv")["norm.decay"]) == {decay}
        files = {"sweep.db", "results.csv", "results.parquet", "report.html", "report.md"}
        assert {path.name for path in workdir.iterdir()} == files | {"members", "figures"}


@pytest.mark.usefixtures("fake_train")
def test_a_sweep_resumes_whose_variants_set_tuples_or_the_capacity(write_sweep, tmp_path):
    axes = {
        "network": {"narrow": {"model.features": (4, 4)}, "wide": {"model.features": (8, 8)}},
        "norm.memory_capacity": (8, 16),
    }
    path, workdir = write_sweep(axes), tmp_path / "sweep"
    for _ in range(2):
        assert sweep_command([path, f"--workdir={workdir}"]) == 0
    trials = store.trials_by_member(store.open_study(workdir)).values()
    capacities = [trial.user_attrs[store.FIELDS]["norm.memory_capacity"] for trial in trials]
    assert sorted(capacities) == [8, 8, 16, 16]


def test_a_memory_without_end_needs_no_room(write_sweep):
    axes = {"norm.memory_size": (0, 2, 16)}
    sweep, config = load_sweep(write_sweep(axes), [], None)
    members = with_room(sweep.members(), config)
    capacities = [member.fields["norm.memory_capacity"] for member in members]
    assert capacities == [0, 16, 16]
    sweep, config = load_sweep(write_sweep({"norm.memory_size": (0,)}), [], None)
    (member,) = with_room(sweep.members(), config)
    assert member.fields["norm.memory_capacity"] == 0
