"""From logits to the next token: what a request asks for, and how a batch of requests is sampled at once."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from moe.errors import UserError
from moe.mesh import spec


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's distribution.

    The filters apply one after the other, in the order in which they stand here (as in Hugging Face
    transformers); the token is drawn from what they leave.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""

    top_k: int = 0
    """Leaves the k most likely tokens; 0 leaves all. Tokens as likely as the last of them stay too."""

    top_p: float = 1.0
    """Leaves the smallest set of most likely tokens that has at least this probability (1904.09751). Tokens
    as likely as the last of them stay too."""

    min_p: float = 0.0
    """Leaves tokens with at least this part of the most likely one's probability (2407.01082)."""

    seed: int = 0
    """The same request with the same seed gives the same tokens, whatever is generated beside it."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be at least 0 (greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be at least 0 (all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p} must lie in [0, 1]")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie in [0, 2^32)")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The `Sampling` of every row of a batch."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]

    @staticmethod
    def of(requests: Sequence[Sampling]) -> "SamplingRows":
        """On the host."""
        dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32)
        columns: Any = [
            np.array([getattr(request, field.name) for request in requests], dtype)
            for field, dtype in zip(fields(Sampling), dtypes, strict=True)
        ]
        return SamplingRows(*columns)


def sample(
    logits: Float[Array, "B V"], rows: SamplingRows, number: Int[Array, "B"], vocabulary: int
) -> Int[Array, "B"]:
    """The next token of each row.

    A row's randomness follows from its seed and from the token's number in its sequence alone. What no row
    asks for is not computed.

    Args:
        logits: of the next token.
        rows: how each row is sampled.
        number: how many tokens each row has generated so far.
        vocabulary: tokens that the tokenizer knows; entries of the model behind them are never drawn.
    """
    on_one_device = partial(_sample, vocabulary=vocabulary)
    return jax.shard_map(on_one_device, in_specs=spec("batch"), out_specs=spec("batch"))(logits, rows, number)


def _sample(logits, rows: SamplingRows, number, *, vocabulary: int):
    logits = jnp.where(jnp.arange(logits.shape[1]) < vocabulary, logits, -jnp.inf)
    greedy, drawn = jnp.argmax(logits, axis=-1), rows.temperature > 0

    def draw():
        scaled = logits / jnp.where(drawn, rows.temperature, 1.0)[:, None]
        noise = jax.vmap(_noise, in_axes=(0, 0, None))(rows.seed, number, logits.shape[1])
        return jnp.argmax(jnp.where(kept(scaled, rows), scaled + noise, -jnp.inf), axis=-1)

    return jnp.where(drawn, jax.lax.cond(drawn.any(), draw, lambda: greedy), greedy).astype(jnp.int32)


def kept(logits: Float[Array, "B V"], rows: SamplingRows) -> Bool[Array, "B V"]:
    """Which tokens the filters leave, by logits that the temperature has divided.

    Nothing is sorted: a filter is a threshold, and each of its 32 bits is found by one look at all tokens.
    """
    bits = _ordered(logits)
    probability = jax.nn.softmax(logits, axis=-1)
    none = bits[:, :1] & 0  # a threshold that all tokens reach

    def by_count():
        k = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[1])[:, None]
        return _largest(lambda t: jnp.sum(bits >= t, axis=-1, keepdims=True) >= k, none)

    def by_mass():
        left = jnp.where(bits >= count, probability, 0.0)
        enough = rows.top_p[:, None] * left.sum(-1, keepdims=True)

        def holds(t):
            return jnp.sum(jnp.where(bits >= t, left, 0.0), axis=-1, keepdims=True) >= enough

        return jnp.where(rows.top_p[:, None] < 1, _largest(holds, none), none)

    count = jax.lax.cond((rows.top_k > 0).any(), by_count, lambda: none)
    mass = jax.lax.cond((rows.top_p < 1).any(), by_mass, lambda: none)
    most = probability.max(-1, keepdims=True)
    return (bits >= count) & (bits >= mass) & (probability >= rows.min_p[:, None] * most)


def _noise(seed, number, size: int):
    """Gumbel noise: the largest of logits plus noise is a draw from their softmax (Gumbel-max)."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), number), (size,))


def _ordered(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Numbers in the order of float32 ones, by their bits."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds, zero: UInt32[Array, "B 1"]) -> UInt32[Array, "B 1"]:
    """The largest number of 32 bits for which `holds`, which it does up to some number in each row."""

    def try_bit(i, found):
        larger = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(larger), larger, found)

    return jax.lax.fori_loop(0, 32, try_bit, zero)
