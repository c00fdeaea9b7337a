"""Why the defaults are what they are: norms, memories and gradients at small batch sizes.

    python experiments/small_batch.py --workdir=runs/small_batch --seeds=5

Trains every variant below of a config with every seed, two runs at a time, and writes results.csv
and table.md. `--variants` takes some of them only. Started again, it keeps the finished runs and
repeats the diverged ones.
"""

import argparse
import concurrent.futures
import csv
import multiprocessing
import pathlib
import statistics

DIGITS = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
VARIANTS = {
    "batch normalization": {"norm.name": "batch", "double_forward": "off"},
    "batch normalization, two-pass variance": {
        "norm.name": "batch",
        "norm.use_fast_variance": False,
        "double_forward": "off",
    },
    "batch normalization, double forward": {"norm.name": "batch"},
    "no normalization": {"norm.name": "none"},
    "memorized (default)": {},
    "double_forward off": {"double_forward": "off"},
    "gradient through": {"norm.gradient": "through"},
    "gradient renorm": {"norm.gradient": "renorm"},
    "memory_size 1": {"norm.memory_size": 1},
    "memory_size 4": {"norm.memory_size": 4},
    "memory_size 16": {"norm.memory_size": 16},
    "memory_size 128": {"norm.memory_size": 128},
    "decay 0.9": {"norm.decay": 0.9},
    "decay 1": {"norm.decay": 1.0},
    "use_fast_variance False": {"norm.use_fast_variance": False},
}


def run(config: str, name: str, seed: int, workdir: pathlib.Path, data_dir: str) -> dict:
    """Trains one variant with one seed; returns its row of the results."""
    from mbn_jax.main import parse_config
    from mbn_jax.train import DivergenceError, train

    fields = {
        "seed": seed,
        "dataset.data_dir": data_dir,
        "eval_every_steps": 10**6,
        "checkpoint_every_steps": 10**6,
    }
    overrides = [f"--config.{k}={v}" for k, v in {**fields, **VARIANTS[name]}.items()]
    row = {"variant": name, "seed": seed, "test_error": "", "diverged_at_step": ""}
    folder = workdir / name.replace(" ", "_").replace(",", "") / str(seed)
    try:
        values = train(parse_config(config, overrides), folder)
    except DivergenceError as error:
        return row | {"diverged_at_step": error.step}
    return row | {"test_error": values["test_error"]}


def table(rows: list[dict]) -> str:
    """Returns test errors by variant as Markdown: mean, standard deviation, runs, diverged runs."""
    lines = ["| variant | test error, % | runs | diverged |", "| --- | --- | --- | --- |"]
    for name in VARIANTS:
        runs = [row for row in rows if row["variant"] == name]
        if not runs:
            continue
        errors = [100 * row["test_error"] for row in runs if row["test_error"] != ""]
        cell = "-"
        if errors:
            spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
            cell = f"{statistics.mean(errors):.2f}{spread}"
        lines.append(f"| {name} | {cell} | {len(runs)} | {len(runs) - len(errors)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs everything that is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--config", default=str(DIGITS))
    parser.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    rows: list[dict] = []
    with concurrent.futures.ProcessPoolExecutor(
        args.processes, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        runs = [
            pool.submit(run, args.config, name, seed, args.workdir, args.data_dir)
            for name in args.variants
            for seed in range(args.seeds)
        ]
        for future in concurrent.futures.as_completed(runs):
            rows.append(future.result())
            print(f"{len(rows)}/{len(runs)} {rows[-1]}", flush=True)
    rows.sort(key=lambda row: (list(VARIANTS).index(row["variant"]), row["seed"]))
    args.workdir.mkdir(parents=True, exist_ok=True)
    with (args.workdir / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (args.workdir / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
