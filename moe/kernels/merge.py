"""Leading axes made one, cut and joined, though they be split over devices: each keeps what it has.

For a reshape that is left to the partitioner it may gather the whole array. Where both of two axes are split,
the order of the merged one follows the devices, so only what treats all entries alike may look at it.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped


def merge(x: Shaped[Array, "B S ..."]) -> Shaped[Array, "B*S ..."]:
    """The two leading axes as one."""
    first, second, *rest = jax.typeof(x).sharding.spec
    return _locally(lambda x: x.reshape(-1, *x.shape[2:]), x, P(_together(first, second), *rest))


def split(x: Shaped[Array, "B*S ..."], batch: int, axes: P) -> Shaped[Array, "B S ..."]:
    """What `merge` made one as two again.

    Args:
        x: the merged array.
        batch: B.
        axes: on which mesh axes B and S lie.
    """
    first, second = (*axes, None, None)[:2]
    here = batch // _devices(first)
    layout = P(first, second, *jax.typeof(x).sharding.spec[1:])
    return _locally(lambda x: x.reshape(here, -1, *x.shape[1:]), x, layout)


def to_groups(x: Shaped[Array, "B S ..."], tokens: int) -> Shaped[Array, "groups T ..."]:
    """Sequences cut into groups of `tokens` tokens, or several of them joined to one."""
    first, second, *rest = jax.typeof(x).sharding.spec
    layout = P(_together(first, second), None, *rest)
    return _locally(lambda x: x.reshape(-1, tokens, *x.shape[2:]), x, layout)


def from_groups(x: Shaped[Array, "groups T ..."], batch: int, axes: P) -> Shaped[Array, "B S ..."]:
    """Groups put together to sequences again (`split` says what the arguments mean)."""
    first, second = (*axes, None, None)[:2]
    here = batch // _devices(first)
    layout = P(first, second, *jax.typeof(x).sharding.spec[2:])
    return _locally(lambda x: x.reshape(here, -1, *x.shape[2:]), x, layout)


def _locally(reshape: Callable, x: Array, layout: P) -> Array:
    """Every device's part reshaped."""
    given = jax.typeof(x).sharding.spec
    if all(entry is None for entry in given):
        return reshape(x)
    return jax.shard_map(reshape, in_specs=given, out_specs=layout)(x)


def _together(*entries) -> tuple[str, ...] | None:
    return tuple(name for entry in entries for name in _names(entry)) or None


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _devices(entry) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in _names(entry))
