"""A workdir in a bucket: a run works on a local copy, which goes there with every checkpoint.

An object store has no appends, no renames and no locks, but an object is there whole or not at all.
So every file is written there whole, and a checkpoint's seal last: one that is there only in part
is damaged, and skipped as on a disk. TensorStore, which Orbax writes arrays with, reaches the
stores.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

import tensorstore

from mbn_jax.errors import UserError, one_line
from mbn_jax.parallel.devices import first_host_first
from mbn_jax.training.seal import SEAL
from mbn_jax.training.workdir import CHECKPOINTS

EVENTS = ".tfevents."


class Bucket:
    """The files of one run below an address.

    Attributes:
      folder: their local copy.
    """

    def __init__(self, address: str, folder: pathlib.Path):
        """Opens `address`, 'gs://BUCKET/PATH' or 's3://BUCKET/PATH'; raises UserError."""
        self._address = address
        self.folder = folder
        with self._reached():
            self._store = tensorstore.KvStore.open(f"{address.rstrip('/')}/").result()

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore raises what Python has for each status.
            raise UserError(
                f"Cannot use --workdir={self._address}: {one_line(error)}; fix this, and run the "
                "same command to resume from the last checkpoint there."
            ) from error

    def _names(self) -> list[str]:
        with self._reached():
            return sorted(name.decode() for name in self._store.list().result())

    def fetch(self, names: Iterable[str] | None = None) -> None:
        """Copies files of the run from the bucket; by default all but events, for people alone.

        Raises:
          UserError: where the bucket cannot be read.
        """
        if names is None:
            names = [name for name in self._names() if _is_of_a_run(name)]
        for name in names:
            with self._reached():
                found = self._store.read(name).result()
            if found.state == "value":
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(found.value)

    def store(self, step: int | None = None) -> None:
        """Copies what the run has written to the bucket, and the checkpoint of a step.

        Then deletes the checkpoints there that are not in the folder any more.

        Raises:
          UserError: where the bucket cannot be written.
        """
        for path in sorted(self.folder.iterdir()):
            if path.is_file():
                self._write(path)
        if step is None:
            return
        self._delete_checkpoint(str(step))  # Of an earlier try.
        files = [f for f in (self.folder / CHECKPOINTS / str(step)).rglob("*") if f.is_file()]
        for path in sorted(files, key=lambda f: f.name == SEAL):
            self._write(path)
        there = {name.split("/")[1] for name in self._names() if name.startswith(f"{CHECKPOINTS}/")}
        here = {path.name for path in (self.folder / CHECKPOINTS).iterdir()}
        for old in sorted(there - here):
            self._delete_checkpoint(old)

    def _write(self, path: pathlib.Path) -> None:
        content = path.read_bytes()
        with self._reached():
            self._store.write(str(path.relative_to(self.folder)), content).result()

    def _delete_checkpoint(self, name: str) -> None:
        first, last = f"{CHECKPOINTS}/{name}/", f"{CHECKPOINTS}/{name}0"  # '0' is next to '/'.
        with self._reached():
            self._store.delete_range(tensorstore.KvStore.KeyRange(first, last)).result()


def _is_of_a_run(name: str) -> bool:
    """Returns whether a run needs this file: other runs may lie below its address."""
    return name.startswith(f"{CHECKPOINTS}/") or ("/" not in name and EVENTS not in name)


@contextlib.contextmanager
def local_copy(address: str) -> Iterator[Bucket]:
    """Fetches a workdir from a bucket into a temporary folder, on every host one of its own.

    Raises:
      UserError: where the bucket cannot be read; and those of the block, which name the address.
    """
    with tempfile.TemporaryDirectory(prefix="mbn-", ignore_cleanup_errors=True) as name:
        with first_host_first():
            bucket = Bucket(address, pathlib.Path(name))
            bucket.fetch()
        try:
            yield bucket
        except UserError as error:
            raise UserError(str(error).replace(name, address)) from error
