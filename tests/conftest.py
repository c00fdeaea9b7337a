"""Eight CPU devices, and silent broadcasting is an error: set before JAX starts."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Compiling takes most of the time of the tests, and each program runs for a moment. With the
    # last two, a step of a small network takes a third of the processor time, tracing included.
    " --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
    # Eight devices on a busy machine of two cores may keep each other waiting for long.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["MPLBACKEND"] = "Agg"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # Leave the user's as it is.

import pytest


def pytest_collection_finish():
    """Spares the collector what was imported, which lives on, and lets it run more rarely.

    Looking through it again and again takes a tenth of the time of a test that compiles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS folder in which the digits are prepared once a session."""
    from mbn_jax.datasets.find import open_split

    folder = tmp_path_factory.mktemp("tfds")
    open_split("digits", "test", data_dir=str(folder))
    return str(folder)
