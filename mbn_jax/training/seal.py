"""The checksums of a checkpoint: it is complete if it has them, and undamaged if they fit."""

import hashlib
import json
import pathlib

from mbn_jax.training.workdir import replace

SEAL = "checksums.json"


def seal(folder: pathlib.Path) -> None:
    """Writes the checksums of a checkpoint that is complete; raises UserError if it cannot."""
    replace(folder / SEAL, json.dumps(_checksums(folder), indent=1).encode())


def damage(folder: pathlib.Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None where it is as it was sealed."""
    try:
        expected = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return "it was not finished"
    except ValueError:
        return f"{SEAL} is damaged"
    try:
        found = _checksums(folder)
    except FileNotFoundError:  # By the run that it belongs to, which is going on.
        return "it was deleted meanwhile"
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} is damaged"
    return None


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != SEAL)
    return {str(file.relative_to(folder)): _sha256(file) for file in files}


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
