"""Prints the table of experiments/ceiling.py, and draws its errors by normalization batch.

    python experiments/scripts/ceiling_table.py --workdir=runs/ceiling

The table is saved to `ceiling.md` in the workdir of the sweep, the figure to `ceiling.png`: test
error with recomputed statistics, mean over seeds and half of its 95 % interval (Student's t). Below
the table are the differences that docs/results/ceiling.md and backward.md name, paired by seed.
"""

import argparse
import pathlib

import matplotlib.pyplot as plt
import pandas as pd

from mbn_jax.sweeps.summary import interval

SIZES = (2, 4, 8)
MEMORIES = ("perfect memory", "transport")
LINES = {"batch": "C0", "perfect memory": "C2", "transport": "C1", "moving average": "C3"}

PAIRS = (
    *(
        (f"{norm}, {kind}", f"{other}, {kind}")
        for kind in ("plain", "standardized")
        for norm, other in (
            *((f"batch {n}", "batch 32") for n in SIZES),
            *((f"{norm} {n}", f"batch {n}") for norm in MEMORIES for n in SIZES),
            ("transport 2", "perfect memory 2"),
            ("transport 2", "off 2"),
            ("moving average 2", "batch 2"),
            ("forward 2, backward 32", "batch 2"),
            ("group", "batch 2"),
            ("group", "batch 32"),
        )
    ),
    *(
        (f"{norm}, standardized", f"{norm}, plain")
        for norm in ("batch 2", "batch 32", "group", "moving average 2")
    ),
    *((f"moving average {n}, standardized", f"batch {n}, standardized") for n in (4, 8)),
    *(
        ("moving average 2, standardized", f"{other}, standardized")
        for other in (
            "moving average 2 with mean",
            "moving average 2 backward alone",
            "batch 32",
            "group",
        )
    ),
    ("moving average 2, standardized", "moving average 2, centered"),
)
"""Settings whose errors are compared."""


def errors(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the last row of each member, with its test error, %, as `error`."""
    last = results[results["last"]]
    # A norm without statistics has nothing to recompute.
    found = 100 * last["recalibrated_test_error"].fillna(last["test_error"])
    return last.assign(error=found)


def differences(results: pd.DataFrame) -> str:
    """Returns a line for each of `PAIRS`: the first minus the second, paired by seed."""
    table = errors(results).pivot(index="seed", columns="norm", values="error")
    found = {(one, other): table[one] - table[other] for one, other in PAIRS}
    return "\n".join(
        f"{one} - {other}: {values.mean():.1f} ± {interval(values):.1f}"
        for (one, other), values in found.items()
    )


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Returns mean and half interval of each norm and kind of kernels, in %."""
    found = errors(results)
    setting = found["norm"].str.rsplit(", ", n=1, expand=True)
    by_setting = found["error"].groupby([setting[0], setting[1]], sort=False)
    table = pd.DataFrame({"mean": by_setting.mean(), "half": by_setting.agg(interval)})
    return table.rename_axis(["norm", "kernels"])


def markdown(table: pd.DataFrame) -> str:
    """Returns a table with a column for each kind of kernels."""
    kinds = list(dict.fromkeys(table.index.get_level_values("kernels")))
    lines = [f"| norm | {' | '.join(kinds)} |", f"| --- |{' --- |' * len(kinds)}"]
    for norm in dict.fromkeys(table.index.get_level_values("norm")):
        cells = [
            "{mean:.1f} ± {half:.1f}".format(**table.loc[norm, kind])
            if (norm, kind) in table.index
            else ""
            for kind in kinds
        ]
        lines.append(f"| {norm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(table: pd.DataFrame, path: pathlib.Path) -> None:
    """Draws errors by normalization batch, a panel for each kind of kernels."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for panel, kind in zip(panels, ("plain", "standardized"), strict=True):
        for line, color in LINES.items():
            sizes = [n for n in (*SIZES, 32) if (f"{line} {n}", kind) in table.index]
            rows = table.loc[[(f"{line} {n}", kind) for n in sizes]]
            options = {"label": line, "color": color, "marker": "o", "capsize": 3}
            panel.errorbar(sizes, rows["mean"], rows["half"], **options)
        group = table.loc["group", kind]["mean"]
        panel.axhline(group, color="gray", linestyle="--", label="group (no batch)")
        panel.set_xscale("log", base=2)
        panel.set_xticks((*SIZES, 32), labels=[str(n) for n in (*SIZES, 32)])
        panel.set_xlabel("normalization batch")
        panel.set_title(f"{kind} kernels")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test error, %")
    panels[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table and saves both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of the sweep")
    workdir = parser.parse_args().workdir
    results = workdir / "results.csv"
    if not results.exists():
        parser.error(f"there is no {results}; run the sweep first")
    found = pd.read_csv(results)
    table = summary(found)
    text = markdown(table)
    (workdir / "ceiling.md").write_text(text + "\n")
    draw(table, workdir / "ceiling.png")
    print(f"{text}\n\n{differences(found)}")


if __name__ == "__main__":
    main()
