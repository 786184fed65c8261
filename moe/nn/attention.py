"""Grouped-query attention with rotary positions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.errors import UserError
from moe.kernels import linear
from moe.kernels.attention import causal_attention
from moe.mesh import spec
from moe.nn.norm import RMSNorm
from moe.nn.parameter import normal, use

# From queries [B, S, H, h], keys and values [B, S, G, h] to what each query finds [B, S, H, h].
Attend = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention."""

    heads: int = 8
    """Query heads H."""

    kv_heads: int = 8
    """Key and value heads G; each serves H / G query heads."""

    head_width: int = 64
    """Width of one head."""

    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on queries and keys: over each head (Qwen3) or over all heads together (OLMoE)."""

    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (2104.09864)."""

    rotary_fraction: float = 1.0
    """Part of each head, from its first dimension on, that is rotated (GLM-4: 0.5)."""

    bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.attention.kv_heads={self.kv_heads} must divide model.attention.heads={self.heads}"
            )
        if not 0.0 <= self.rotary_fraction <= 1.0:
            raise UserError(
                f"model.attention.rotary_fraction={self.rotary_fraction} must lie between 0 and 1"
            )
        if self.rotary_width % 2:
            raise UserError(
                f"model.attention.head_width={self.head_width} must leave an even number of dimensions for "
                f"rotary positions; rotary_fraction={self.rotary_fraction} of it is {self.rotary_width}"
            )

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def value_width(self) -> int:
        """Width of a head's values."""
        return self.head_width

    @property
    def projected_width(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    def build(
        self, width: int, *, out_std: float, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> "Attention":
        """The module of one layer.

        Args:
            width: of the tokens, D.
            out_std: factor on the initial deviation of the output matrix.
            epsilon: of norms.
            dtype: of activations and products.
            rngs: randomness of the initial values.
        """
        return Attention(self, width, out_std=out_std, epsilon=epsilon, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(head width)) v over earlier tokens of the sequence."""

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        *,
        out_std: float,
        epsilon: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
        self.w_q = normal(rngs.params(), (width, queries), ("embed", "heads"), width**-0.5)
        self.w_k = normal(rngs.params(), (width, keys), ("embed", "heads"), width**-0.5)
        self.w_v = normal(rngs.params(), (width, keys), ("embed", "heads"), width**-0.5)
        self.w_out = normal(rngs.params(), (queries, width), ("heads", "embed"), out_std * queries**-0.5)
        if config.bias:
            self.b_q, self.b_k, self.b_v = (
                nnx.Param(jnp.zeros(size), out_sharding=("norm",)) for size in (queries, keys, keys)
            )
        match config.qk_norm:
            case "head":
                self.q_norm = RMSNorm(config.head_width, epsilon)
                self.k_norm = RMSNorm(config.head_width, epsilon)
            case "full":
                self.q_norm = RMSNorm(queries, epsilon)
                self.k_norm = RMSNorm(keys, epsilon)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"] | None = None,
        attend: Attend = causal_attention,
    ) -> Float[Array, "B S D"]:
        """Attend to earlier tokens within each sequence.

        Args:
            x: tokens.
            positions: where each stands, rising along S; None where they are all there and count from 0.
            attend: where queries find keys and values: among those of `x`, or also in a cache.
        """
        q, k, v = self._project(x)
        positions = jnp.arange(x.shape[1]) if positions is None else positions
        q, k = (rotate(a, positions, self.config.rope_theta, self.config.rotary_width) for a in (q, k))
        # Over split sequences every device takes some of its heads through whole ones (Ulysses, 2309.14509).
        q, k, v = jax.sharding.reshard((q, k, v), spec("batch", None, "attended_heads"))
        y = jax.sharding.reshard(attend(q, k, v), spec("batch", "sequence", "heads"))
        return linear(rearrange(y, "B S H h -> B S (H h)"), use(self.w_out, self.dtype, "heads"))

    def _project(self, x):
        q, k, v = (linear(x, use(w, self.dtype, None, "heads")) for w in (self.w_q, self.w_k, self.w_v))
        if self.config.bias:
            q, k, v = (
                a + use(b, self.dtype, "heads") for a, b in ((q, self.b_q), (k, self.b_k), (v, self.b_v))
            )
        if self.config.qk_norm == "full":
            # Held apart from the products before them: that fusion is what libtpu of jax 0.11.2 dies of.
            q, k = self.q_norm(jax.lax.optimization_barrier(q)), self.k_norm(jax.lax.optimization_barrier(k))
        q, k, v = (rearrange(a, "B S (H h) -> B S H h", h=self.config.head_width) for a in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def rotate(
    x: Float[Array, "B S H h"], positions: Int[Array, "*B S"], theta: float, width: int
) -> Float[Array, "B S H h"]:
    """Rotary position embedding (2104.09864 eq. 34), pairing the two halves of a head as Llama does.

    Args:
        x: queries or keys.
        positions: where each stands.
        theta: base of the frequencies.
        width: dimensions of a head that are rotated, the first ones; the rest stays.
    """
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, width), axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
