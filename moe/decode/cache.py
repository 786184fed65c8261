"""What a layer remembers of the sequences in progress: keys and values, and how new tokens find them.

Arrays have a row for each *slot*, in which one sequence at a time is generated. Slots are split over the mesh
like a batch, and everything here runs on every device by itself: a slot's number counts on its device.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe.mesh import spec
from moe.nn import AttentionConfig, LatentAttentionConfig

CacheType = Literal["float32", "bfloat16", "int8"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """Vectors of every head and position, head by head, so that attention reads each in one go."""

    values: Shaped[Array, "B G S h"]

    scale: Float[Array, "B G S"] | None
    """Factor of each int8 vector; None where values stand as they are."""

    @staticmethod
    def of(x: Float[Array, "B S G h"], dtype: jnp.dtype) -> "Heads":
        """Vectors stored in `dtype`; int8 is symmetric, largest magnitude 127."""
        x = x.swapaxes(1, 2)
        if dtype != jnp.int8:
            return Heads(x.astype(dtype), None)
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1) / 127
        return Heads(jnp.round(x / jnp.maximum(scale, 1e-30)[..., None]).astype(dtype), scale)

    def at_least(self, dtype: jnp.dtype) -> Float[Array, "B G S h"]:
        """The numbers to multiply by queries of `dtype`, still without their scale."""
        return self.values.astype(dtype) if self.scale is not None else self.values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer."""

    k: Heads
    v: Heads

    @staticmethod
    def empty(
        config: AttentionConfig | LatentAttentionConfig, slots: int, length: int, dtype: jnp.dtype
    ) -> "LayerCache":
        """A cache on the mesh that is set.

        Args:
            config: of the attention whose keys and values it holds.
            slots: B, over all devices.
            length: S, most tokens of a sequence.
            dtype: in which they are stored.
        """
        nothing = jnp.zeros((slots, length, config.kv_heads, config.head_width))
        heads = jax.sharding.reshard(Heads.of(nothing, dtype), spec("batch"))
        return LayerCache(heads, jax.tree.map(jnp.copy, heads))

    def insert(
        self, slot: Int[Array, "R"], k: Float[Array, "R s G h"], v: Float[Array, "R s G h"]
    ) -> "LayerCache":
        """With the first s tokens of some sequences.

        Args:
            slot: of each sequence, on its device; sequences without such a slot are left out.
            k: keys.
            v: values.
        """
        return jax.shard_map(_insert, in_specs=spec("batch"), out_specs=spec("batch"))(self, slot, k, v)

    def attend(
        self,
        position: Int[Array, "B"],
        q: Float[Array, "B 1 H h"],
        k: Float[Array, "B 1 G h"],
        v: Float[Array, "B 1 G h"],
    ) -> tuple[Float[Array, "B 1 H h"], "LayerCache"]:
        """Put one more token into each slot, and let it attend to itself and those before it.

        Args:
            position: where the token stands.
            q: its queries.
            k: its keys.
            v: its values.

        Returns:
            What it finds, softmax(q k^T / sqrt(h)) v, and the cache with it.
        """
        attend = jax.shard_map(_attend, in_specs=spec("batch"), out_specs=spec("batch"))
        return attend(self, position, q, k, v)


def _insert(cache: LayerCache, slot, k, v) -> LayerCache:
    length = k.shape[1]

    def put(heads: Heads, x):
        fresh = Heads.of(x, heads.values.dtype)
        return jax.tree.map(lambda old, new: old.at[slot, :, :length].set(new, mode="drop"), heads, fresh)

    return LayerCache(put(cache.k, k), put(cache.v, v))


def _attend(cache: LayerCache, position, q, k, v):
    slots, _, heads, width = q.shape
    slot, head = jnp.arange(slots)[:, None], jnp.arange(k.shape[2])
    # Every vector by itself: for a slice over heads XLA turns the whole cache round on TPU, and back again.
    place = (slot, head, position[:, None])

    def put(heads: Heads, x):
        fresh = Heads.of(x, heads.values.dtype)
        return jax.tree.map(lambda old, new: old.at[place].set(new[:, :, 0]), heads, fresh)

    cache = LayerCache(put(cache.k, k), put(cache.v, v))
    keys, values = cache.k.at_least(q.dtype), cache.v.at_least(q.dtype)
    q = q.reshape(slots, -1, heads // k.shape[2], width).astype(keys.dtype)
    scores = jnp.einsum("bgrh,bgsh->bgrs", q, keys, preferred_element_type=jnp.float32) * width**-0.5
    if cache.k.scale is not None:
        scores = scores * cache.k.scale[:, :, None]
    seen = jnp.arange(keys.shape[2]) <= position[:, None, None, None]
    share = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    if cache.v.scale is not None:
        share = share * cache.v.scale[:, :, None]
    y = jnp.einsum("bgrs,bgsh->bgrh", share.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return y.reshape(slots, 1, heads, width).astype(v.dtype), cache
