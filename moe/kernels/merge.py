"""Two leading axes made one, and back, where both may be split over devices: every device keeps what it has.

Where only the first is split this is a reshape. Where both are, the order of the merged axis follows the
devices, so only what treats all of its entries alike may look at it.
"""

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped


def merge(x: Shaped[Array, "B S ..."]) -> Shaped[Array, "B*S ..."]:
    """The two leading axes as one."""
    first, second, *rest = jax.typeof(x).sharding.spec
    if second is None:
        return jax.lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=P(first, *rest))
    both = P((*_names(first), *_names(second)), *rest)
    return jax.shard_map(_flat, in_specs=P(first, second, *rest), out_specs=both)(x)


def split(x: Shaped[Array, "B*S ..."], batch: int, axes: P) -> Shaped[Array, "B S ..."]:
    """What `merge` made one as two again.

    Args:
        x: the merged array.
        batch: B.
        axes: on which mesh axes B and S lie.
    """
    first, second = (*axes, None, None)[:2]
    rest = jax.typeof(x).sharding.spec[1:]
    if second is None:
        shape = (batch, x.shape[0] // batch, *x.shape[1:])
        return jax.lax.reshape(x, shape, out_sharding=P(first, None, *rest))
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1
    for name in _names(first):
        devices *= mesh.shape[name]

    def on_one_device(x):
        return x.reshape(batch // devices, -1, *x.shape[1:])

    both = P((*_names(first), *_names(second)), *rest)
    return jax.shard_map(on_one_device, in_specs=both, out_specs=P(first, second, *rest))(x)


def to_groups(x: Shaped[Array, "B S ..."], tokens: int) -> Shaped[Array, "groups T ..."]:
    """Sequences cut into groups of `tokens` tokens, or several of them joined to one."""
    batch, sequence, *rest = x.shape
    first, second, *others = jax.typeof(x).sharding.spec
    if tokens < sequence:
        cut = (batch, sequence // tokens, tokens, *rest)
        return merge(jax.lax.reshape(x, cut, out_sharding=P(first, second, None, *others)))
    joined = (batch * sequence // tokens, tokens, *rest)
    return jax.lax.reshape(x, joined, out_sharding=P(first, None, *others))


def from_groups(x: Shaped[Array, "groups T ..."], batch: int, axes: P) -> Shaped[Array, "B S ..."]:
    """Groups put together to sequences again (`split` says what the arguments mean)."""
    groups, tokens, *rest = x.shape
    shape = (batch, groups * tokens // batch, *rest)
    first, second = (*axes, None, None)[:2]
    others = jax.typeof(x).sharding.spec[2:]
    if groups > batch:
        x = split(x, batch, axes)
    return jax.lax.reshape(x, shape, out_sharding=P(first, second, *others))


def _flat(x):
    return x.reshape(-1, *x.shape[2:])


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
