"""Data sources of the user: each example is checked, and the message says which one is wrong."""

import numpy as np
import pytest

from mbn_jax.datasets.own import load_own_split
from mbn_jax.errors import UserError


class Source:
    """Two classes of examples; `changed` replaces one of the four."""

    num_classes = 2

    def __init__(self, changed=None, first=None):
        good = first or {"image": np.zeros((2, 2), np.float32), "label": 1}
        self._examples = [good, good, good, changed or good]

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        return self._examples[index]


def load(changed=None, split="train", first=None):
    def function(split, data_dir):
        return Source(changed, first)

    return load_own_split("mine:photos", function, split, {}, None, max_bytes_in_memory=1 << 20)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"image": np.zeros((2, 2), np.float32)},
            r"has \['image'\], expected \['image', 'label'\]",
        ),
        ({"image": np.full((2, 2), np.nan, np.float32), "label": 1}, "'image' that is NaN"),
        ({"image": np.full((2, 2), 1e300), "label": 1}, "'image' that is .* infinite in float32"),
        ({"image": np.zeros((2, 2), np.float32), "label": 2**32 + 1}, "'label' beyond .* of int32"),
        ({"image": np.zeros((2, 3), np.float32), "label": 1}, r"shape \(2, 3\) and float32"),
        ({"image": np.zeros((2, 2), np.float32), "label": 2}, "label 2, expected 0 to 1"),
        ({"image": np.zeros((2, 2), np.float32), "label": -1}, "label -1, expected 0 to 1"),
    ],
)
def test_an_example_that_is_not_like_the_first_is_named(changed, message):
    with pytest.raises(UserError, match=rf"Example 3 of split 'train'.*{message}"):
        load(changed)


@pytest.mark.parametrize(("first", "other"), [("u1", "u2"), ("i1", "i8"), ("f2", "f8")])
def test_numbers_that_the_first_dtype_cannot_hold_are_refused_and_not_wrapped(first, other):
    examples = [{"image": np.full((2, 2), 44, dtype), "label": 1} for dtype in (first, other)]
    with pytest.raises(UserError, match=rf"Example 3 .* and {np.dtype(other)}, expected"):
        load(examples[1], first=examples[0])


def test_numbers_that_the_first_dtype_can_hold_are_taken():
    first = {"image": np.zeros((2, 2), np.float32), "label": 1}
    split = load({"image": np.full((2, 2), 44, np.uint8), "label": np.int8(0)}, first=first)
    read = split.read(np.array([3]))
    assert read["image"].dtype == np.float32
    assert (read["image"] == 44).all()


def test_a_split_is_a_part_of_the_source():
    split = load(split="train[1:3]")
    assert len(split) == 2
    assert split.num_classes == 2
    with pytest.raises(UserError, match=r"no examples in split 'train\[3:3\]'"):
        load(split="train[3:3]")


def test_an_example_without_arrays_is_refused():
    class Empty(Source):
        def __getitem__(self, index):
            return {}

    with pytest.raises(UserError, match="is an empty dict, expected arrays by name"):
        load_own_split(
            "mine:nothing",
            lambda split, data_dir: Empty(),
            "train",
            {},
            None,
            max_bytes_in_memory=0,
        )
