"""Losses, by name: what a training step minimizes, and what an evaluation measures."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.names import kwargs_of, named

Batch = Mapping[str, jax.Array]
EvalMetrics = dict[str, Any]


class Loss(Protocol):
    """What `loss.name` must name: a class of such objects, or a function that returns one."""

    def __call__(self, apply: Callable, batch: Batch):
        """Returns (loss, (metrics, updates)) of a batch in training.

        Args:
          apply: the model, bound; `apply(*inputs, train=True)` returns (outputs, updates).
          batch: arrays `[batch, ...]` by name.
        """

    def eval_metrics(self, apply: Callable, batch: Batch) -> EvalMetrics:
        """Returns the metrics of each example at inference, 'loss' among them.

        Args:
          apply: the model at inference; `apply(*inputs, train=False)` returns the outputs.
          batch: arrays `[batch, ...]` by name; the last batch of a split is padded.

        Returns:
          By name an array `[batch]`, averaged over the examples; or a pair of arrays `[batch]`,
          numerator and denominator of a ratio of sums over the examples.
        """


class CrossEntropy:
    """Cross-entropy of a classifier of batch['image'] by batch['label'], and its error."""

    def __call__(self, apply: Callable, batch: Batch):
        """Returns mean cross-entropy, {'error': share of wrong predictions} and the updates."""
        logits, updates = apply(batch["image"], train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        error = jnp.mean(logits.argmax(-1) != batch["label"])
        return loss.mean(), ({"error": error}, updates)

    def eval_metrics(self, apply: Callable, batch: Batch) -> EvalMetrics:
        """Returns cross-entropy and wrong predictions of each example."""
        logits = jnp.asarray(apply(batch["image"], train=False))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": loss, "error": logits.argmax(-1) != batch["label"]}


LOSSES: dict[str, Callable[..., Loss]] = {"cross_entropy": CrossEntropy}


def build_loss(config: ConfigDict) -> Loss:
    """Builds the loss that `config.loss` names; raises UserError where it is none."""
    name = config.loss.name
    loss = named(name, LOSSES, "loss.name")(**kwargs_of(config.loss))
    if not callable(loss) or not callable(getattr(loss, "eval_metrics", None)):
        raise UserError(
            f"loss.name={name!r} must name a class of losses, or a function that returns one: an "
            "object to call with (apply, batch) that has eval_metrics(apply, batch); got "
            f"{type(loss).__name__}."
        )
    return loss


def check_eval_metrics(found: Any, size: int) -> None:
    """Checks what `eval_metrics` returned for a batch; raises ValueError in a sentence."""
    expected = "eval_metrics must return a dict with 'loss'"
    if not isinstance(found, Mapping) or "loss" not in found:
        got = f"a dict with {sorted(found)}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{expected}, got {got}")
    for name, value in found.items():
        parts = value if isinstance(value, tuple) else (value,)
        shapes = [getattr(part, "shape", None) for part in parts]
        if len(parts) > 2 or any(shape != (size,) for shape in shapes):
            raise ValueError(
                f"eval_metrics must return a number for each of the {size} examples, an array of "
                f"shape ({size},) or a pair of such arrays, got shape "
                f"{', '.join(map(str, shapes))} for {name!r}"
            )


def masked_sums(found: EvalMetrics, mask: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns numerator and denominator of each metric, summed over the examples that count.

    Args:
      found: from `eval_metrics`.
      mask: bool `[batch]`, False for padding.

    >>> mask = jnp.array([True, True, False])
    >>> sums = masked_sums({'loss': jnp.array([1.0, 2.0, 9.0])}, mask)
    >>> [float(x) for x in sums['loss']]
    [3.0, 2.0]
    """

    def total(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        return jnp.sum(jnp.where(mask, x, 0))

    def sums(value: Any) -> tuple[jax.Array, jax.Array]:
        if isinstance(value, tuple):
            return total(value[0]), total(value[1])
        return total(value), jnp.sum(mask)

    return {name: sums(value) for name, value in found.items()}
