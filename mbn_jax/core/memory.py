"""The memory of batch moments: how batches enter it, how it is pooled, how an update moves it.

Pure functions on arrays. `F` is the feature shape, `k` the number of slots. Two kinds of memory
share one interface: `Slots` keeps each of the last batches, `Endless` keeps the pool of all
batches.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from mbn_jax.core.moments import Array, Moments, Schedule, abs_sq, is_usable, select, value_at
from mbn_jax.core.transport import transport


def memory_weights(
    count: Array, memory_size: int | Array, decay: float | Array, *, newest_age: int = 0
) -> Array:
    """Returns what the slots weigh in the pool, newest first, up to a common factor::

        w_i = decay^i,    of the filled slots i < memory_size

    Empty slots weigh nothing, so the first steps need neither a burn-in nor a prior. The geometric
    form is this project's choice.

    Args:
      count: `[k, *F]`, elements behind each slot; 0 = empty.
      memory_size: slots in use, 1 to k; a number or a traced integer.
      decay: in (0, 1]; 1 weighs all slots equally; a number or a traced float.
      newest_age: of the first slot; 1 for weights beside a batch that is not in the memory yet.

    Returns:
      `[k, *F]`.

    >>> memory_weights(jnp.array([8.0, 8.0, 8.0, 0.0]), memory_size=2, decay=0.5).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    dtype = count.dtype
    age = newest_age + jnp.arange(count.shape[0]).reshape((-1,) + (1,) * (count.ndim - 1))
    weight = jnp.asarray(decay, dtype) ** age.astype(dtype)
    # As floats, because a scheduled size need not be whole. With newest_age=1 the last slot is the
    # one that a new batch drops.
    in_use = (age.astype(dtype) < jnp.asarray(memory_size, dtype)) & (age < count.shape[0])
    return jnp.where((count > 0) & in_use, weight, 0)


def rule_at(memory_size: Schedule | None, decay: Schedule, step: Array) -> tuple[Any, Any]:
    """Returns memory size and decay at a step; a scheduled size is at least 1.

    >>> size, decay = rule_at(lambda step: step / 10, 0.5, jnp.array(3))
    >>> float(size), decay
    (1.0, 0.5)
    """
    size: Any = memory_size
    if callable(memory_size):
        size = jnp.maximum(value_at(memory_size, step), 1)
    return size, value_at(decay, step)


def pool(slots: Moments, weights: Array) -> Moments:
    """Pools the slots of a memory by the law of total variance::

        a_i = w_i / sum_j w_j
        mean = sum_i a_i m_i        var = sum_i a_i (v_i + |m_i - mean|^2)

    With equal weights and equal batches these are the statistics of the batches concatenated.

    Args:
      slots: `Moments` of shape `[k, *F]`.
      weights: `[k, *F]`, from `memory_weights`.

    Returns:
      `Moments` of shape `[*F]`, whose count is the sum of the weights; mean 0 and variance 1 where
      that is 0: an empty memory normalizes nothing.

    >>> slots = Moments(jnp.array([1.0, 3.0]), jnp.array([0.5, 0.5]), jnp.array([4.0, 4.0]))
    >>> [float(value) for value in pool(slots, jnp.array([1.0, 1.0]))]
    [2.0, 1.5, 2.0]
    """
    total = weights.sum(0)
    filled = total > 0
    share = (1 / jnp.where(filled, total, 1)).astype(slots.var.dtype)
    # Selected, not multiplied away: what is in an unused slot must not matter.
    used = weights > 0
    weights = weights.astype(slots.var.dtype)
    # Relative to the newest slot, so that an offset common to all slots costs no digits; and the
    # variance in its centred form, because E[m^2] - E[m]^2 would cancel.
    newest = jnp.where(used[0], slots.mean[0], jnp.zeros_like(slots.mean[0]))
    away = jnp.where(used, slots.mean - newest[None], jnp.zeros_like(slots.mean))
    mean = newest + share * (weights * away).sum(0)
    square = jnp.where(used, slots.var + abs_sq(slots.mean - mean[None]), jnp.zeros_like(slots.var))
    var = share * (weights * square).sum(0)
    return Moments(mean, jnp.where(filled, var, jnp.ones_like(var)), total)


def push(slots: Moments, moments: Moments, *, leave_gaps: bool = False) -> Moments:
    """Puts a batch's moments in front of the memory and drops the oldest slot.

    A feature of which the batch had no element (`count` 0), or whose moments are not finite, keeps
    its memory as it was: one bad batch must not blind a memory of many good ones.

    Args:
      slots: `Moments` of shape `[k, *F]`.
      moments: `Moments` of shape `[*F]`.
      leave_gaps: put an empty slot in front for such a feature instead.

    Returns:
      `Moments` of shape `[k, *F]`, in the dtypes of `slots`.

    >>> empty = Moments(jnp.zeros(2), jnp.ones(2), jnp.zeros(2))
    >>> push(empty, Moments(jnp.array(5.0), jnp.array(2.0), jnp.array(8.0))).mean.tolist()
    [5.0, 0.0]
    """
    usable = is_usable(moments)
    if leave_gaps:
        mean, var, count = moments
        gap = Moments(jnp.zeros_like(mean), jnp.ones_like(var), jnp.zeros_like(count))
        moments, usable = select(usable, moments, gap), jnp.ones_like(usable)

    def shift(slot: Array, new: Array) -> Array:
        shifted = jnp.concatenate([new[None].astype(slot.dtype), slot[:-1]])
        return jnp.where(usable[None], shifted, slot)

    return Moments(*map(shift, slots, moments))


def pool_of_two(first: Moments, second: Moments) -> Moments:
    """Pools two pools, weighted by their counts, by the law of total variance::

        a = n_2 / (n_1 + n_2)    mean = m_1 + a (m_2 - m_1)
        var = (1 - a) (v_1 + a |m_2 - m_1|^2) + a v_2

    What one of them holds does not matter where its count is 0.

    Args:
      first: `Moments` of shape `[*F]`; what it holds is the pool where neither has a count.
      second: likewise.

    Returns:
      `Moments` of shape `[*F]`.

    >>> first = Moments(jnp.array(1.0), jnp.array(0.5), jnp.array(1.0))
    >>> second = Moments(jnp.array(3.0), jnp.array(0.5), jnp.array(1.0))
    >>> [float(value) for value in pool_of_two(first, second)]
    [2.0, 1.5, 2.0]
    """
    total = first.count + second.count
    share = (second.count / jnp.where(total > 0, total, 1)).astype(first.var.dtype)
    # Selected, not multiplied away: it may be huge, or not finite.
    has_second = second.count > 0
    has_first = (first.count > 0) | ~has_second
    first, second = select(has_first, first, second), select(has_second, second, first)
    away = second.mean - first.mean
    mean = first.mean + share * away
    var = (1 - share) * (first.var + share * abs_sq(away)) + share * second.var
    return Moments(mean, var, total)


@dataclasses.dataclass(frozen=True)
class Slots:
    """A memory that keeps each of the last batches in a slot, newest first.

    Its moments are `[k, *F]`; `count` is the number of elements behind a slot, 0 = empty.

    Attributes:
      memory_size: batches in the pool, the current one included; a number or a traced value.
      decay: weight of a slot relative to the next newer one; likewise.
    """

    memory_size: int | Array
    decay: float | Array

    def pooled(self, slots: Moments) -> Moments:
        """Returns the pool, `[*F]`."""
        return pool(slots, memory_weights(slots.count, self.memory_size, self.decay))

    def without_oldest(self, slots: Moments) -> Moments:
        """Returns the pool of the slots that stay when a batch is pushed, `[*F]`.

        Its `count` is their weight relative to that batch, whose weight is 1.
        """
        weights = memory_weights(slots.count, self.memory_size, self.decay, newest_age=1)
        return pool(slots, weights)

    def oldest(self, slots: Moments) -> Moments:
        """Returns the slot that a pushed batch drives out of the pool; `count` is its weight."""
        size = jnp.asarray(jnp.ceil(self.memory_size), jnp.int32)
        oldest = jnp.minimum(size, slots.count.shape[0]) - 1
        slot = Moments(*(value[oldest] for value in slots))
        dtype = slot.count.dtype
        weight = jnp.asarray(self.decay, dtype) ** (oldest + 1).astype(dtype)
        return slot._replace(count=jnp.where(slot.count > 0, weight, 0))

    def pushed(self, slots: Moments, batch: Moments, *, in_turn: bool = False) -> Moments:
        """Returns the memory after `batch` is pushed.

        Args:
          slots: the memory.
          batch: moments of the batch, `[*F]`.
          in_turn: several calls of one forward push in turn. A batch that is not usable then leaves
            an empty slot, because `transported` knows the slots of a call by their places.
        """
        return push(slots, batch, leave_gaps=in_turn)

    def transported(
        self, slots: Moments, before: Moments, after: Moments, epsilon: float, call: int, calls: int
    ) -> Moments:
        """Returns the memory after the shift of one call's batch has moved it.

        Args:
          slots: the memory, in which the earlier calls of this forward have pushed their batches.
          before: moments of the batch before the update, `[*F]`.
          after: moments of the same batch after the update, `[*F]`.
          epsilon: added to variances.
          call: which call of the layer in this forward this is, from 0.
          calls: number of calls in one forward; the slots of each call move by its own shift.
        """
        moved = transport(slots, before, after, epsilon)
        if calls == 1:
            return moved
        age = jnp.arange(slots.mean.shape[0]) - call
        own = (age >= 0) & (age % calls == calls - 1 - call)
        return select(own.reshape((-1,) + (1,) * before.mean.ndim), moved, slots)


@dataclasses.dataclass(frozen=True)
class Endless:
    """A memory that keeps the pool of all batches, each `decay` times the weight of the next newer.

    Its moments are `[*F]`; `count` is the weight of all batches, in units of the newest.

    Attributes:
      decay: a number or a traced value.
    """

    decay: float | Array

    def pooled(self, memory: Moments) -> Moments:
        """Returns the pool, `[*F]`."""
        return memory

    def without_oldest(self, memory: Moments) -> Moments:
        """Returns the pool that stays when a batch is pushed, `[*F]`: all of it.

        Its `count` is its weight relative to that batch, whose weight is 1.
        """
        return memory._replace(count=self.decay * memory.count)

    def oldest(self, memory: Moments) -> Moments:
        """Returns what leaves the pool when a batch is pushed: nothing, of count 0."""
        return memory._replace(count=jnp.zeros_like(memory.count))

    def pushed(self, memory: Moments, batch: Moments, *, in_turn: bool = False) -> Moments:
        """Returns the memory after `batch` is pushed; an unusable batch changes nothing.

        It has no slots, so that turns (`in_turn`) do not matter.
        """
        usable = is_usable(batch)
        batch = batch._replace(count=jnp.ones_like(memory.count))
        new = pool_of_two(self.without_oldest(memory), batch)
        kept = select(usable, new, memory)
        return Moments(*(x.astype(old.dtype) for x, old in zip(kept, memory, strict=True)))

    def transported(
        self,
        memory: Moments,
        before: Moments,
        after: Moments,
        epsilon: float,
        call: int,
        calls: int,
    ) -> Moments:
        """Returns the memory after a batch's shift has moved it; as for `Slots`.

        Raises:
          ValueError: for several calls in one forward, which one pool cannot tell apart.
        """
        if calls > 1:
            raise ValueError(
                f"An endless memory (memory_size=None) cannot tell the {calls} calls of its "
                "layer in one forward apart, and so cannot move; use double_forward='rewrite', or "
                "a memory_size."
            )
        return transport(memory, before, after, epsilon)
