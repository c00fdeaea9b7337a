"""Arrays to and from the devices, in the layout of `jax.pmap`, and hosts in agreement.

Every array that lives on the devices has a leading axis with one entry a local device.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mbn_jax.errors import UserError

PyTree = Any

AXIS_NAME = "batch"
"""The axis of the devices, for `jax.pmap` and for the layers that sync over it."""

Devices = Sequence[jax.Device] | None
"""Some of this host's devices; None: all that there are, on all hosts."""


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles for the next process, where it is not told otherwise.

    Call it after the hosts have joined. On the CPUs of several hosts nothing is kept, whatever JAX
    is told: only the first host would keep its programs, and on the next start be ahead of the
    others, which compile, for longer than the 30 s that their collectives wait for each other.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = os.path.join(home, "mbn_jax", "compiled")
    if home.startswith("~"):
        return  # No home folder is known.
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)


def check_devices() -> None:
    """Raises UserError where JAX finds no device of the platform that it was told to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The latter without a message.
        reason = " ".join(str(error).split()) or "it has no such backend"
        raise UserError(
            f"JAX finds no devices for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} "
            f"({reason}); install JAX for this platform and check its "
            "driver, or set JAX_PLATFORMS=cpu."
        ) from error


def local_devices(devices: Devices = None) -> Sequence[jax.Device]:
    """Returns the devices of this host among them."""
    return devices or jax.local_devices()


def _sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS_NAME,)), PartitionSpec(AXIS_NAME))


def _map_key(function: Callable[[jax.Array], jax.Array], key: jax.Array) -> jax.Array:
    """Applies a function to the data of typed random keys, which keep their implementation."""
    data = function(jax.random.key_data(key))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def replicate(tree: PyTree, devices: Devices = None) -> PyTree:
    """Puts a copy of every array on each local device (or of `devices`), `[devices, ...]`."""
    devices = local_devices(devices)
    sharding = _sharding(devices)

    def copy(x) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return _map_key(copy, x)
        # From the host: donating the result must never delete the array it was made from.
        x = np.array(x)[None]
        shards = [jax.device_put(x.copy(), device) for device in devices]
        shape = (len(devices), *x.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(copy, tree)


def distribute(tree: PyTree, devices: Devices = None) -> PyTree:
    """Puts arrays `[devices, ...]` on the local devices (or on `devices`), entry by entry."""
    return jax.device_put(tree, _sharding(local_devices(devices)))


def first_device(tree: PyTree) -> PyTree:
    """Returns the first device's entry of every array, for what is the same on all."""

    def first(x):
        if not isinstance(x, jax.Array):
            return x[0]
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return _map_key(first, x)
        # Of its own shard: x[0] would run a program on all devices, with a collective.
        return x.addressable_data(0)[0]

    return jax.tree.map(first, tree)


def gather_over_hosts(tree: PyTree) -> PyTree:
    """Returns host copies of arrays `[devices, ...]`, with the entries of all hosts' devices."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(jax.device_get(tree), tiled=True)


def agree(values: np.ndarray) -> np.ndarray:
    """Returns the first host's values on every host."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


@contextlib.contextmanager
def first_host_first(*, together: bool = False) -> Iterator[None]:
    """Lets the first host through a block before the others, for what one writes for all.

    Where the block fails on one host, no host continues: it would wait for that one for ever.

    Args:
      together: let all hosts through at the same time.

    Raises:
      UserError: where the block failed on another host.
    """
    if jax.process_count() == 1:
        yield
        return
    first = jax.process_index() == 0
    if not (first or together):
        multihost_utils.sync_global_devices("first_host_first")
    failed = True
    try:
        yield
        failed = False
    finally:
        if first and not together:
            multihost_utils.sync_global_devices("first_host_first")
        failures = np.flatnonzero(multihost_utils.process_allgather(np.array(failed)))
    if len(failures):
        raise UserError(f"Host {failures[0]} cannot continue; fix what its own message says.")


def check_alike(**numbers: int) -> None:
    """Raises UserError where hosts differ in numbers that must be the same on all."""
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.array(list(numbers.values())))
    for name, values in zip(numbers, np.asarray(found).T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise UserError(
                f"The hosts differ in {name}, {values} in their order; give all the same data."
            )


def split_over_devices(batch: PyTree, *, axis: int = 0, devices: Devices = None) -> PyTree:
    """Moves the batch `axis` of host arrays into `[devices, ..., batch / devices, ...]`.

    >>> devices = jax.local_device_count()
    >>> split_over_devices({'index': np.arange(2 * devices)})['index'].shape == (devices, 2)
    True
    """
    count = len(local_devices(devices))

    def split(x: np.ndarray) -> np.ndarray:
        parts = np.split(x, count, axis=axis)
        return np.stack(parts)

    return jax.tree.map(split, batch)
