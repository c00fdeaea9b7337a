"""Checks that the packages of the extra 'train' are installed, before a command imports them."""

import importlib.util

from mbn_jax.errors import UserError

TRAIN_PACKAGES = (
    "PIL",
    "absl",
    "grain",
    "importlib_resources",
    "matplotlib",
    "ml_collections",
    "optuna",
    "orbax",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "tensorboardX",
    "tensorflow_datasets",
)
"""Import names of the extra 'train' of pyproject.toml."""


def require_train_extra() -> None:
    """Raises UserError where a package of the extra 'train' is not installed."""
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            "this command needs the extra 'train': pip install 'mbn-jax[train]' "
            f"(not found: {', '.join(missing)})"
        )
