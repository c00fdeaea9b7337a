"""What a checkpoint of a large state costs training: several processes on this machine.

    python experiments/scripts/save_cost.py --workdir=runs/save_cost --millions=25 \
        --processes 1 2 4 8 --before=CHECKOUT

Each process has one CPU device and the state of a network with so many million float32 parameters,
which a donating step changes again and again. The table has, as medians over the saves:

* still: how long the slowest process waits for `Checkpoints.save` before it can train on;
* sealed: how long after the start of the save the checkpoint has its checksums;
* lost: what of that was lost for training: the time until the seal, less the steps done meanwhile.

`--before` names a checkout of another commit, whose package is measured in turn with this one's:
the last columns are ratios to it. On CPU the steps and the writing share the cores, so `lost` is
more than it is where an accelerator trains. Result: docs/results/saves.md.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
SEAL = "checksums.json"  # Of either version, which may keep its name in another module.
ARRAYS = 16
COLUMNS = ("still", "sealed", "lost")


def run_process(args: argparse.Namespace) -> None:
    """Saves from one of several processes, and prints a line of JSON for each save."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental import multihost_utils

    from mbn_jax.parallel.devices import replicate
    from mbn_jax.step.state import TrainState
    from mbn_jax.training.checkpoints import Checkpoints

    if args.count > 1:
        jax.distributed.initialize(args.address, args.count, args.process)
    size = int(args.millions * 1e6 / ARRAYS)
    keys = jax.random.split(jax.random.key(0), ARRAYS)  # Random: no file gets small by zeros.
    params = {f"layer{i}": jax.random.normal(keys[i], (size,)) for i in range(ARRAYS)}
    variables = {"params": params, "batch_stats": {"norm": {"mean": jnp.ones(64)}}}
    fresh = TrainState.create(variables, optax.sgd(0.1), jax.random.key(0))
    state = replicate(fresh)
    del fresh, params, variables

    def train(state):
        params = jax.tree.map(lambda x: x * 1.0001, state.params)
        return state.replace(params=params)

    step = jax.pmap(train, donate_argnums=0)
    checkpoints = Checkpoints(args.workdir, keep=1)
    for number in range(args.saves + 1):
        begin = time.perf_counter()
        for _ in range(args.steps):
            state = jax.block_until_ready(step(state))
        alone = (time.perf_counter() - begin) / args.steps
        # Meanwhile, processes do as many steps as they can: the number of the save is the same.
        state = state.replace(step=jnp.full_like(state.step, number))
        sealed = args.workdir / str(number) / SEAL
        multihost_utils.sync_global_devices("save")
        begin = time.perf_counter()
        checkpoints.save(state, local_statistics=False)
        still, steps = time.perf_counter() - begin, 0
        while not sealed.exists():
            state, steps = jax.block_until_ready(step(state)), steps + 1
        until = time.perf_counter() - begin
        values = {"still": still, "sealed": until, "lost": until - steps * alone}
        print(json.dumps(values), flush=True)
    checkpoints.close()


def measure(args: argparse.Namespace, checkout: pathlib.Path, count: int) -> dict[str, float]:
    """Runs the processes with the package of a checkout; returns the medians over the saves."""
    shutil.rmtree(args.workdir, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"workdir": args.workdir, "millions": args.millions, "saves": args.saves}
    options |= {"steps": args.steps, "address": address, "count": count}
    command = [sys.executable, __file__, *(f"--{k}={v}" for k, v in options.items())]
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout)}
    started = [
        subprocess.Popen(
            [*command, f"--process={i}"],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    printed = [process.communicate()[0].splitlines() for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("A process failed.")
    shutil.rmtree(args.workdir)
    # The first save of each makes folders and threads.
    saves = zip(*([json.loads(line) for line in lines[1:]] for lines in printed), strict=True)
    slowest = [{name: max(x[name] for x in found) for name in COLUMNS} for found in saves]
    return {name: statistics.median(x[name] for x in slowest) for name in COLUMNS}


def main() -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=lambda x: pathlib.Path(x).absolute(), required=True)
    parser.add_argument("--millions", type=float, default=25.0, help="million parameters")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--saves", type=int, default=5, help="saves of each process, after one")
    parser.add_argument("--steps", type=int, default=5, help="steps between them, at least")
    parser.add_argument("--before", type=pathlib.Path, help="checkout of another commit")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process is not None:
        run_process(args)
        return
    checkouts = {"before": args.before.absolute()} if args.before else {}
    checkouts["now"] = ROOT
    names = [f"{name} {key}" for key in checkouts for name in COLUMNS]
    ratios = [f"{name}, ratio" for name in COLUMNS] if args.before else []
    print(f"| processes | {' | '.join([*names, *ratios])} |")
    print(f"|{' --- |' * (1 + len(names) + len(ratios))}")
    for count in args.processes:
        found = {key: measure(args, checkout, count) for key, checkout in checkouts.items()}
        cells = [f"{x[name]:.2f} s" for x in found.values() for name in COLUMNS]
        if args.before:
            cells += [f"{found['now'][n] / found['before'][n]:.2f}" for n in COLUMNS]
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
