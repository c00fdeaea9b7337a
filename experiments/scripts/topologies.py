"""Accelerators that are not there, for compiling a program that is not run."""

import importlib
import os
import pathlib
from typing import Any

import jax
from jax.experimental import topologies

from mbn_jax.errors import one_line

MEMORY_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "h100": 80}
"""High-bandwidth memory of a chip, by the word that a topology begins with."""

GPUS_PER_HOST = 8

# What XLA reads from a device where there is one.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def topology_devices(topology: str) -> list[Any]:
    """Returns the devices of `v5e:16x16` (any TPU topology) or `h100:64` (hosts of eight GPUs).

    TPUs are described by pip's libtpu, GPUs by JAX's CUDA plugin: the extras `tpu` and `cuda`.

    Raises:
      ValueError: if the topology is unknown or what describes it is not installed.
    """
    family, _, shape = topology.partition(":")
    if family == "h100":
        return gpu_devices(shape)
    return tpu_devices(topology)


def tpu_devices(topology: str) -> list[Any]:
    """Returns the devices of a TPU topology, from `libtpu` alone."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # This may be no TPU's host.
    try:
        library = importlib.import_module("libtpu")
    except ModuleNotFoundError as error:
        raise ValueError("a TPU topology needs libtpu: pip install '.[train,tpu]'") from error
    path = pathlib.Path(library.__file__ or "").parent / "libtpu.so"
    os.environ.setdefault("TPU_LIBRARY_PATH", str(path))
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:  # Unknown, or another process has libtpu.
        raise ValueError(
            f"libtpu cannot describe the topology {topology!r} ({one_line(error)}); v5e:2x4 is one"
        ) from error


def gpu_devices(number: str) -> list[Any]:
    """Returns a number of H100s, eight on a host, from JAX's CUDA plugin alone."""
    if not number.isdigit() or int(number) % GPUS_PER_HOST or int(number) == 0:
        raise ValueError(f"h100 takes a multiple of {GPUS_PER_HOST} GPUs, got {number!r}")
    shape = f"1x{int(number) // GPUS_PER_HOST}x{GPUS_PER_HOST}"  # Slices, hosts, devices a host.
    options = {"target_config": H100, "topology": shape}
    # Where there is no GPU, the plugin registers itself only if JAX is not to use one.
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc("h100", "cuda", **options)
    except NotImplementedError as error:
        raise ValueError(
            "a GPU topology needs JAX's plugin: pip install '.[train,cuda]'"
        ) from error
    return found.devices
