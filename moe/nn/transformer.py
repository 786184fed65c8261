"""The decoder transformer: dense and MoE layers in any pattern, stacked and scanned."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe.balance import BalanceLoss, RoutingStatistics
from moe.errors import UserError
from moe.kernels import linear
from moe.kernels.attention import causal_attention
from moe.mesh import logical_rules, spec
from moe.nn.attention import Attend, AttentionConfig
from moe.nn.depth import DepthRouter, tokens_taken
from moe.nn.feed_forward import FeedForward
from moe.nn.latent_attention import LatentAttentionConfig
from moe.nn.moe_config import MoEConfig
from moe.nn.moe_layer import MoELayer
from moe.nn.norm import RMSNorm
from moe.nn.parameter import normal, plain, use
from moe.nn.pattern import repeats
from moe.nn.quantized import add_clipping
from moe.quant import format_named

Remat = Literal["none", "dots", "full"]

# What the backward pass keeps from the forward pass: everything, the results of matrix products with
# parameters, or only each scanned unit's input.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm decoder transformer."""

    vocab_size: int = 4096
    """Entries of the vocabulary V; must cover the tokenizer's."""

    width: int = 256
    """Model width D."""

    layers: str = "MMMM"
    """One letter a layer, bottom first: D dense, M mixture of experts. In a config: layers="D" + 26 * "M".
    Lower-case d and m are blocks that only some tokens enter (Mixture-of-Depths, 2404.02258)."""

    depth_capacity: float = 0.125
    """Fraction of each sequence's tokens that enter a lower-case layer."""

    attention: AttentionConfig | LatentAttentionConfig = field(default_factory=AttentionConfig)
    """Attention of every layer: AttentionConfig(...), or LatentAttentionConfig(...) as DeepSeek has it."""

    dense_width: int = 1024
    """Hidden width of dense layers' feed-forward."""

    moe: MoEConfig = field(default_factory=MoEConfig)
    """The mixture of every M layer."""

    tied_embedding: bool = False
    """Use the transposed embedding as output head."""

    norm_epsilon: float = 1e-6
    """Added to the mean square in every RMSNorm."""

    compute_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Precision of activations and matrix products; parameters, router and norms are float32."""

    learned_clipping: str = ""
    """Number format, like int4, for which each matrix learns how much of every range to keep (LSQ 1902.08153,
    as a share of the largest weight, 2308.13137); of use where `quantization.train` says the same."""

    remat: Remat = "none"
    """What backward recomputes: none, all but parameter matrix products (dots), or whole layers (full)."""

    unroll: bool = False
    """Compile every layer by itself instead of one loop over them: longer to compile, but what backward needs
    is not copied in and out of stacks, which costs a GPU time and memory."""

    def __post_init__(self):
        if not self.layers or set(self.layers) - set("DMdm"):
            raise UserError(
                f"model.layers={self.layers!r} must be one letter a layer: D dense, M mixture of experts, "
                "d and m the same for some tokens only"
            )
        if self.learned_clipping:
            format_named(self.learned_clipping)
        if not 0.0 < self.depth_capacity <= 1.0:
            raise UserError(f"model.depth_capacity={self.depth_capacity} must lie in (0, 1]")

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers."""
        return count_moe(self.layers)

    def counts_first(self, accumulation: int) -> bool:
        """Whether a train step begins with a forward pass over all micro-batches, for their totals.

        A balance loss over the whole batch needs them: it is then exactly that of the undivided batch, for
        a third more compute; averaging each micro-batch's own would be another loss (2501.11873, section 3).
        """
        whole = any(isinstance(b, BalanceLoss) and b.needs_batch for b in self.moe.balance)
        return accumulation > 1 and self.moe_layers > 0 and whole

    @property
    def looks_ahead(self) -> list[str]:
        """What lets outputs depend on later tokens, so that the model cannot generate; none is usual."""
        depth = [f"model.layers={self.layers!r}"] if self.layers != self.layers.upper() else []
        routing = self.moe.routing
        strategy = [f"model.moe.routing={routing}"] if self.moe_layers and not routing.causal else []
        return depth + strategy

    def depth_tokens(self, sequence: int) -> int:
        """Tokens of a sequence that enter a lower-case layer."""
        return tokens_taken(self.depth_capacity, sequence)

    @property
    def dtype(self) -> jnp.dtype:
        """`compute_dtype` as JAX knows it."""
        return jnp.dtype(self.compute_dtype)


def count_moe(layers: str) -> int:
    """Number of MoE layers in a pattern."""
    return layers.upper().count("M")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), the latter dense or a mixture.

    Of a lower-case kind, it is applied to the tokens that its `DepthRouter` takes.
    """

    def __init__(self, config: TransformerConfig, kind: str, rngs: nnx.Rngs):
        # Residual branches start small, so that depth does not raise the variance (GPT-2).
        out_std = (2 * len(config.layers)) ** -0.5
        shared = {"out_std": out_std, "dtype": config.dtype, "rngs": rngs}
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = config.attention.build(config.width, epsilon=config.norm_epsilon, **shared)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
        if kind.islower():
            self.depth = DepthRouter(config.width, config.depth_capacity, rngs=rngs)
        if kind.upper() == "M":
            self.moe = MoELayer(config.moe, config.width, **shared)
        else:
            self.dense = FeedForward(config.width, config.dense_width, **shared)

    def __call__(
        self, x, token_id, mask, keys, layer, positions=None, attend: Attend = causal_attention
    ) -> tuple[Float[Array, "B S D"], RoutingStatistics | None]:
        """Apply the block; statistics only where there is a mixture."""

        def block(x, token_id, mask, positions=positions):
            x = x + self.attention(self.attention_norm(x), positions, attend)
            normed = self.feed_forward_norm(x)
            if hasattr(self, "moe"):
                y, statistics = self.moe(normed, token_id, mask, keys, layer)
                return x + y, statistics
            return x + self.dense(normed), None

        if hasattr(self, "depth"):
            return self.depth(block, x, token_id, mask)
        return block(x, token_id, mask)


class Unit(nnx.Module):
    """The shortest run of blocks that repeats: what one iteration of a scan applies."""

    def __init__(self, config: TransformerConfig, kinds: str, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, kind, rngs) for kind in kinds])

    def __call__(self, x, token_id, mask, keys, layer):
        """Apply the blocks; statistics of the MoE ones, stacked [M layers of the unit, B, ...].

        `layer` is the index of the unit's first MoE layer among all of them.
        """
        statistics = []
        for block in self.blocks:
            x, measured = block(x, token_id, mask, keys, layer + len(statistics))
            statistics += [] if measured is None else [measured]
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *statistics) if statistics else None


class Transformer(nnx.Module):
    """Tokens to final hidden states; `logits` and the loss put the head on top."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = normal(
            rngs.params(), (config.vocab_size, config.width), ("vocab", "embed"), config.width**-0.5
        )

        def stack(kinds: str, count: int) -> Unit:
            keys = jax.random.split(rngs.params(), count)
            build = nnx.transform_metadata(lambda key: Unit(config, kinds, nnx.Rngs(key)), partition="layer")
            return jax.vmap(build)(keys)

        self.stacks = nnx.List([stack(kinds, count) for kinds, count in repeats(config.layers)])
        self.final_norm = RMSNorm(config.width, config.norm_epsilon)
        if not config.tied_embedding:
            self.head = normal(
                rngs.params(), (config.width, config.vocab_size), ("embed", "vocab"), config.width**-0.5
            )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B S D"], RoutingStatistics | None]:
        """Final hidden states, and routing statistics [L, B, ...] of the MoE layers, bottom first.

        Args:
            tokens: vocabulary ids.
            mask: False for padding (routing statistics leave it out); None where there is none.
            keys: randomness of this step while training, one key a sequence: what is drawn does not follow
                from how sequences are put together in micro-batches.
        """
        mask = jnp.ones_like(tokens, dtype=bool) if mask is None else mask
        tokens, mask = jax.sharding.reshard((tokens, mask), spec("batch", "sequence"))
        x = self.embed(tokens)
        statistics = []
        for stack, first in zip(self.stacks, self._first_layers(), strict=True):
            x, measured = self._scan(stack, x, tokens, mask, keys, first)
            statistics += [] if measured is None else [measured]
        merged = jax.tree.map(lambda *s: jnp.concatenate(s), *statistics) if statistics else None
        return self.final_norm(x), merged

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """What enters the first layer."""
        # Cast after the look-up, so that a token's gradient is summed over its places in float32.
        table, layout = use(self.embedding, self.embedding[...].dtype), spec("batch", "sequence")
        rows = table.at[tokens].get(out_sharding=layout)
        return rows.astype(self.config.dtype)

    def blocks(self) -> list[Block]:
        """Every layer's block by itself, bottom first: copies out of the stacks."""
        found = []
        for stack in self.stacks:
            structure, layers = nnx.split(stack)
            for i in range(jax.tree.leaves(layers)[0].shape[0]):
                found += nnx.merge(structure, jax.tree.map(lambda p, i=i: p[i], layers)).blocks
        return found

    def output_head(self) -> Float[Array, "D V"]:
        """The output matrix in compute precision, whole on every device."""
        return plain(self._head(), self.config.dtype)

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Scores of the next token, float32."""
        return linear(hidden, self._head(), preferred_element_type=jnp.float32)

    def update_controllers(self, batch: RoutingStatistics) -> None:
        """Hand each MoE layer's strategy and controller the whole batch's statistics, fields [L, ...]."""
        for layer, indices in self._moe_layers():
            layer.update_state(jax.tree.map(lambda x, indices=indices: x[indices], batch))

    def bias_norms(self) -> Float[Array, "L"]:
        """Euclidean norm of each MoE layer's controller bias."""
        norms = jnp.zeros(self.config.moe_layers)
        for layer, indices in self._moe_layers():
            bias = layer.controller_state["bias"][...]
            norms = norms.at[indices].set(jnp.linalg.norm(bias, axis=-1))
        return norms

    def _head(self):
        if self.config.tied_embedding:
            return use(self.embedding, self.config.dtype).T
        return use(self.head, self.config.dtype)

    def _first_layers(self) -> Iterator[int]:
        """For each stack, the index of its first MoE layer among all of them."""
        first = 0
        for kinds, count in repeats(self.config.layers):
            yield first
            first += count_moe(kinds) * count

    def _moe_layers(self) -> Iterator[tuple[MoELayer, np.ndarray]]:
        """The stacked MoE layers, each with the indices among all of those it stands for."""
        counts = [count for _, count in repeats(self.config.layers)]
        for stack, first, count in zip(self.stacks, self._first_layers(), counts, strict=True):
            layers = [block.moe for block in stack.blocks if hasattr(block, "moe")]
            for index, layer in enumerate(layers):
                yield layer, first + index + len(layers) * np.arange(count)

    def _scan(self, stack: Unit, x, tokens, mask, keys, first: int):
        structure, layers = nnx.split(stack)
        count = jax.tree.leaves(layers)[0].shape[0]
        moe_layers = first + sum(hasattr(block, "moe") for block in stack.blocks) * jnp.arange(count)

        def body(x, layer):
            state, index = layer
            return nnx.merge(structure, state)(x, tokens, mask, keys, index)

        if self.config.remat != "none":
            # In a loop nothing can be shared between the passes anyway, and the barriers cost something. One
            # layer makes no loop: XLA would share what was to be computed again.
            policy, alone = REMAT_POLICIES[self.config.remat], self.config.unroll or count == 1
            body = jax.checkpoint(body, policy=policy, prevent_cse=alone)
        x, statistics = jax.lax.scan(body, x, (layers, moe_layers), unroll=self.config.unroll)
        # [units, M layers a unit, B, ...] -> [layers, B, ...]
        return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), statistics)


def build(config: TransformerConfig, key: Key[Array, ""]) -> Transformer:
    """A model with fresh parameters, made on the devices of the mesh that is set, each part where it stays.

    Under `jax.eval_shape` it gives shapes and shardings only, so any published size can be inspected.
    """

    def make(key):
        model = Transformer(config, rngs=nnx.Rngs(key))
        if config.learned_clipping:
            add_clipping(model, format_named(config.learned_clipping))
        return model

    with logical_rules():
        return jax.jit(make)(key)


def structure(config: TransformerConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and the shapes of its parameters, at no cost."""
    graph, params, _ = nnx.split(jax.eval_shape(lambda: build(config, jax.random.key(0))), nnx.Param, ...)
    return graph, params
