"""The examples outside of the package: trained, swept and reported by the commands alone."""

import json
import os
import pathlib
import subprocess
import sys

import pandas as pd
import pytest
from runs import xla_flags

ROOT = pathlib.Path(__file__).parent.parent

COMMANDS = """
import json, sys
from mbn_jax import main
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [f"mbn-{name}", *arguments]
    try:
        getattr(main, f"{name}_main")()
    except SystemExit as end:
        if end.code:
            raise
"""


def run_commands(*commands, cwd):
    """Runs commands one after the other in one process, which starts and imports once."""
    return subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.slow
def test_segmentation_is_trained_swept_and_reported(tmp_path):
    folder = ROOT / "examples" / "segmentation"
    small = [
        "--config.dataset.kwargs.examples=40",
        "--config.model.kwargs.width=4",
        "--config.num_epochs=2",
        "--config.eval_batch_size=16",  # Of 20: the last batch is padded.
    ]
    train = ["train", f"--config={folder}/config.py", f"--workdir={tmp_path}/run", *small]
    sweep = ["sweep", f"{folder}/memory_size.py", f"--workdir={tmp_path}/sweep", "--seeds=1"]
    evaluate = ["eval", f"--workdir={tmp_path}/run", "--split=test"]
    ended = run_commands(
        train, [*sweep, *small], ["report", f"{tmp_path}/sweep"], evaluate, cwd=tmp_path
    )
    assert "preset recommended" in ended.stderr
    trained, swept, _, evaluated = ended.stdout.splitlines()
    assert "test iou 0." in trained
    assert "3 finished" in swept
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(evaluated)["iou"] == last["test_iou"]
    assert {"train_iou", "test_loss"} <= set(last)
    results = pd.read_csv(tmp_path / "sweep" / "results.csv")
    assert results.test_iou.notna().all()
    assert "test iou" in (tmp_path / "sweep" / "report.md").read_text()
    assert len(list((tmp_path / "sweep" / "figures").glob("*test_iou.png"))) == 2
    assert len((folder / "README.md").read_text().splitlines()) <= 40
