"""Variables of an NNX model as nested dicts with names for keys, and back.

NNX numbers the entries of lists; here every key is a string, as everywhere in flax's variables.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

PyTree = Any
Names = tuple[str, ...]


def names_of(path: tuple[Any, ...]) -> Names:
    """Returns a path of NNX as names.

    >>> names_of(('blocks', 0, 'norm'))
    ('blocks', '0', 'norm')
    """
    return tuple(map(str, path))


def paths_of(state: nnx.State) -> dict[Names, tuple[Any, ...]]:
    """Returns the path of NNX for each name in a state."""
    return {names_of(path): path for path, _ in nnx.to_flat_state(state)}


def values_of(state: nnx.State) -> dict[Names, Any]:
    """Returns what the Variables of a state hold, by name."""
    return {
        names_of(path): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def leaves_of(tree: PyTree) -> dict[Names, Any]:
    """Returns what is at the ends of nested dicts, by name.

    >>> leaves_of({'a': {'b': 1}, 'c': (2, 3)})
    {('a', 'b'): 1, ('c',): (2, 3)}
    """
    if not isinstance(tree, Mapping):
        return {(): tree}
    return {
        (str(key), *names): leaf
        for key, child in tree.items()
        for names, leaf in leaves_of(child).items()
    }


def subtree(tree: PyTree, names: Names) -> PyTree:
    """Returns what is under a name in nested dicts; {} where nothing is.

    >>> subtree({'a': {'b': 1}}, ('a',)), subtree({}, ('a',))
    ({'b': 1}, {})
    """
    for name in names:
        tree = tree.get(name, {})
    return tree


def write(model: nnx.Module, values: Mapping[Names, Any]) -> None:
    """Writes values into the Variables of a model.

    Raises:
      ValueError: where a value has no Variable.
    """
    paths = paths_of(nnx.state(model))
    unknown = ["/".join(names) for names in sorted(set(values) - set(paths))]
    if unknown:
        raise ValueError(
            f"The arrays must be those of the same model, which has no {', '.join(unknown[:5])}."
        )
    nnx.update(model, nnx.from_flat_state({paths[n]: value for n, value in values.items()}))
