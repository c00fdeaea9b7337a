"""Named settings of the memory and the second forward, for any config."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mbn_jax.errors import UserError

COMMON: dict[str, Any] = {
    "norm.name": "memorized",
    "norm.memory_capacity": 0,
    "norm.memory_schedule.start_size": 0,
    "double_forward_fraction": 1.0,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The method as published: few batches, equal weights.
    "paper": COMMON | {"norm.memory_size": 8, "norm.decay": 1.0, "double_forward": "rewrite"},
    # What was best over five seeds (docs/results/transport_statistics.md).
    "recommended": COMMON
    | {"norm.memory_size": 64, "norm.decay": 0.97, "double_forward": "transport"},
}
"""What each preset sets, by field."""


def use_preset(config: ConfigDict, name: str) -> None:
    """Sets the fields of a preset; raises UserError for an unknown one.

    >>> from mbn_jax.training.config import default_config
    >>> config = default_config()
    >>> use_preset(config, 'recommended')
    >>> config.double_forward, preset_of(config)
    ('transport', 'recommended')
    """
    if name not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}.")
    config.update_from_flattened_dict(dict(PRESETS[name]))


def preset_of(config: ConfigDict) -> str | None:
    """Returns the name of the preset whose fields a config has, or None."""
    for name, fields in PRESETS.items():
        now = config.copy_and_resolve_references()
        now.update_from_flattened_dict(dict(fields))
        if now == config:
            return name
    return None
