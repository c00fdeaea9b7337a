"""Intersection over union by memory size.

mbn-sweep examples/segmentation/memory_size.py --workdir=runs/segmentation_memory
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Segmentation by memory size",
        text="A small U-Net on shapes on textured ground, batch size 2.",
        configs={"segmentation:Shapes": "config.py"},
        axes={"norm.memory_size": (1, 4, 64)},
        seeds=3,
        baseline={"norm.memory_size": 1},
        metrics=("test_iou", "test_loss"),
        figures=[
            Figure(y="test_iou", x="norm.memory_size"),
            Figure(y="test_iou", lines="norm.memory_size"),
        ],
    )
