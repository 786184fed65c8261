"""Multi-head latent attention: queries, keys and values from narrow latents (DeepSeek-V2 2405.04434, 2.1)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.errors import UserError
from moe.kernels import linear
from moe.kernels.attention import causal_attention
from moe.mesh import spec
from moe.nn.attention import Attend, rotate
from moe.nn.norm import RMSNorm
from moe.nn.parameter import normal, use


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Causal attention whose keys and values are made of one latent vector a token, and of a rotated part.

    A head's queries and keys have a part without positions, made from latents, and a rotated part, which for
    keys all heads share.
    """

    heads: int = 16
    """Heads H, each with keys and values of its own."""

    query_rank: int = 0
    """Width of the latent from which queries are made (DeepSeek-V3: 1536); 0 makes them from the token."""

    kv_rank: int = 512
    """Width of the latent from which keys and values are made."""

    plain_width: int = 128
    """Width of a head's queries and keys without positions."""

    rotary_width: int = 64
    """Width of their rotated part."""

    value_width: int = 128
    """Width of a head's values; at most that of its queries."""

    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (2104.09864)."""

    def __post_init__(self):
        if self.rotary_width % 2:
            raise UserError(f"model.attention.rotary_width={self.rotary_width} must be even")
        if self.value_width > self.head_width:
            raise UserError(
                f"model.attention.value_width={self.value_width} must not exceed plain_width + rotary_width="
                f"{self.head_width}"
            )

    @property
    def head_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.plain_width + self.rotary_width

    @property
    def kv_heads(self) -> int:
        """As many as there are heads."""
        return self.heads

    @property
    def projected_width(self) -> int:
        """See `AttentionConfig`."""
        return self.heads * (2 * self.head_width + self.value_width)

    def build(
        self, width: int, *, out_std: float, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> "LatentAttention":
        """See `AttentionConfig`."""
        return LatentAttention(self, width, out_std=out_std, epsilon=epsilon, dtype=dtype, rngs=rngs)


class LatentAttention(nnx.Module):
    """See `LatentAttentionConfig`. Caches hold what `attend` is given: keys and values of all heads."""

    def __init__(
        self,
        config: LatentAttentionConfig,
        width: int,
        *,
        out_std: float,
        epsilon: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        queries, values = config.heads * config.head_width, config.heads * config.value_width
        plain = config.heads * config.plain_width
        if config.query_rank:
            self.w_q_down = normal(rngs.params(), (width, config.query_rank), ("embed", None), width**-0.5)
            self.q_norm = RMSNorm(config.query_rank, epsilon)
            self.w_q_up = normal(
                rngs.params(), (config.query_rank, queries), ("embed", "heads"), config.query_rank**-0.5
            )
        else:
            self.w_q = normal(rngs.params(), (width, queries), ("embed", "heads"), width**-0.5)
        latent = config.kv_rank + config.rotary_width
        self.w_kv_down = normal(rngs.params(), (width, latent), ("embed", None), width**-0.5)
        self.kv_norm = RMSNorm(config.kv_rank, epsilon)
        self.w_kv_up = normal(
            rngs.params(), (config.kv_rank, plain + values), ("embed", "heads"), config.kv_rank**-0.5
        )
        self.w_out = normal(rngs.params(), (values, width), ("heads", "embed"), out_std * values**-0.5)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"] | None = None,
        attend: Attend = causal_attention,
    ) -> Float[Array, "B S D"]:
        """Attend to earlier tokens within each sequence; see `Attention`."""
        config = self.config
        positions = jnp.arange(x.shape[1]) if positions is None else positions
        q = rearrange(self._queries(x), "B S (H h) -> B S H h", H=config.heads)
        latent, k_rotary = jnp.split(linear(x, use(self.w_kv_down, self.dtype)), [config.kv_rank], axis=-1)
        kv = linear(self.kv_norm(latent), use(self.w_kv_up, self.dtype, None, "heads"))
        kv = rearrange(kv, "B S (H h) -> B S H h", H=config.heads)
        k, v = jnp.split(kv, [config.plain_width], axis=-1)

        q, q_rotary = jnp.split(q, [config.plain_width], axis=-1)
        q_rotary, k_rotary = (
            self._rotate(a, positions) for a in (q_rotary, rearrange(k_rotary, "B S h -> B S 1 h"))
        )
        q = jnp.concatenate([q, q_rotary], axis=-1)
        layout = jax.typeof(q_rotary).sharding.spec
        k_rotary = jnp.broadcast_to(k_rotary, q_rotary.shape, out_sharding=layout)
        k = jnp.concatenate([k, k_rotary], axis=-1)
        # The kernels want values as wide as keys; what is added is zero and cut off again.
        narrower = config.head_width - config.value_width
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, narrower)))
        q, k, v = jax.sharding.reshard((q, k, v), spec("batch", None, "attended_heads"))
        y = jax.sharding.reshard(attend(q, k, v), spec("batch", "sequence", "heads"))
        y = rearrange(y[..., : config.value_width], "B S H h -> B S (H h)")
        return linear(y, use(self.w_out, self.dtype, "heads"))

    def _queries(self, x: Float[Array, "B S D"]) -> Float[Array, "B S Hh"]:
        if not self.config.query_rank:
            return linear(x, use(self.w_q, self.dtype, None, "heads"))
        latent = self.q_norm(linear(x, use(self.w_q_down, self.dtype)))
        return linear(latent, use(self.w_q_up, self.dtype, None, "heads"))

    def _rotate(self, x: Float[Array, "B S H h"], positions: Int[Array, "*B S"]) -> Float[Array, "B S H h"]:
        """Rotary positions that pair neighbouring dimensions, as DeepSeek's weights want them."""
        halves = rearrange(x, "B S H (h two) -> B S H (two h)", two=2)
        return rotate(halves, positions, self.config.rope_theta, self.config.rotary_width)
