"""The folder that data sets are read from."""

import os

from mbn_jax.command_line import expand_home
from mbn_jax.errors import UserError


def find_data_dir(data_dir: str | None) -> str | None:
    """Returns `dataset.data_dir` with `~` expanded, or None for TFDS's own folder.

    Raises:
      UserError: where that would be in a home folder that is not known.
    """
    if data_dir:
        return expand_home(data_dir, "dataset.data_dir")
    if not os.environ.get("TFDS_DATA_DIR") and os.path.expanduser("~").startswith("~"):
        raise UserError(
            "TFDS keeps its data sets in the home folder, which is not known; set dataset.data_dir "
            "to a folder for them."
        )
    return None
