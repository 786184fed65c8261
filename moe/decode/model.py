"""A trained model laid out for decoding, and its forward passes: over prompts, and over one more token."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe.balance import Controller
from moe.decode.cache import LayerCache
from moe.dispatch import Dropless
from moe.dispatch.touched import Touched
from moe.errors import UserError
from moe.kernels.attention import causal_attention
from moe.mesh import logical_rules
from moe.nn import Transformer, TransformerConfig, structure
from moe.nn.attention import Attend
from moe.nn.parameter import use
from moe.nn.quantized import HEAD
from moe.nn.transformer import Block
from moe.quant import Format, QuantizedMatrix, quantize
from moe.routing import RoundRobin

Caches = tuple[LayerCache, ...]  # of every layer, bottom first

FLOAT32_AXES = {"router", "norm"}  # parameters that are used in float32 whatever the compute precision


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """Matrices in compute precision, every layer's by themselves, so that a step copies none out of a stack.

    On a mesh experts are split over `expert`, and everything else is whole on every device: a token is too
    little work to gather parameters for.
    """

    transformer: Transformer
    """The model without its layers."""

    layers: tuple[Block, ...]
    """They, bottom first."""

    @staticmethod
    def of(config: TransformerConfig, params: nnx.State, controllers: nnx.State) -> "Decoder":
        """Lay out a model's parameters, on the mesh that is set.

        Args:
            config: of the model that was trained.
            params: its parameters.
            controllers: state of its balance controllers and strategies.

        Raises:
            UserError: it cannot be decoded token by token (`for_decoding`).
        """
        graph, _ = structure(for_decoding(config))

        @jax.jit
        def lay_out(params, controllers):
            model: Transformer = nnx.merge(graph, params, controllers)
            if config.tied_embedding and _quantized(params):
                _untie(model)
            layers = tuple(_used(block, config.dtype) for block in model.blocks())
            model.stacks = nnx.List([])
            return Decoder(_used(model, config.dtype), layers)

        return lay_out(params, controllers)

    @property
    def config(self) -> TransformerConfig:
        """The model's, as it is decoded."""
        return self.transformer.config

    def prefill(
        self, caches: Caches, tokens: Int[Array, "R s"], length: Int[Array, "R"], slot: Int[Array, "R"]
    ) -> tuple[Float[Array, "R V"], Caches]:
        """Read prompts into slots.

        Args:
            caches: of all layers.
            tokens: the prompts, padded behind.
            length: tokens of each that are no padding.
            slot: of each, on its device; a prompt without such a slot is read in vain.

        Returns:
            Logits behind each prompt's last token, and the caches with them.
        """

        def attend_in(cache: LayerCache, q, k, v):
            return causal_attention(q, k, v), cache.insert(slot, k, v)

        mask = jnp.arange(tokens.shape[1]) < length[:, None]
        hidden, caches = self._hidden(tokens, mask, None, caches, attend_in)
        last = jax.vmap(lambda rows, n: rows.at[n - 1].get(mode="clip"))(hidden, length)
        return self.transformer.logits(last[:, None])[:, 0], caches

    def step(
        self, caches: Caches, token: Int[Array, "B"], position: Int[Array, "B"], active: Bool[Array, "B"]
    ) -> tuple[Float[Array, "B V"], Caches]:
        """One more token of every slot.

        Args:
            caches: of all layers.
            token: vocabulary ids.
            position: where they stand.
            active: False for slots whose tokens mean nothing: no expert is read for them.

        Returns:
            Logits behind each token, and the caches with them.
        """

        def attend_in(cache: LayerCache, q, k, v):
            return cache.attend(position, q, k, v)

        hidden, caches = self._hidden(token[:, None], active[:, None], position[:, None], caches, attend_in)
        return self.transformer.logits(hidden)[:, 0], caches

    def _hidden(self, tokens, mask, positions, caches: Caches, attend_in: Callable):
        """Final hidden states, and the caches afterwards."""
        x, written = self.transformer.embed(tokens), []

        def attend(cache: LayerCache) -> Attend:
            def with_cache(q, k, v):
                y, fresh = attend_in(cache, q, k, v)
                written.append(fresh)
                return y

            return with_cache

        mixtures = 0
        for layer, cache in zip(self.layers, caches, strict=True):
            x, statistics = layer(x, tokens, mask, None, jnp.int32(mixtures), positions, attend(cache))
            mixtures += statistics is not None
        return self.transformer.final_norm(x), tuple(written)


def for_decoding(config: TransformerConfig) -> TransformerConfig:
    """A trained model's config as it is decoded: no losses, no groups of tokens, no capacity.

    Raises:
        UserError: what cannot be decoded token by token, by the name of its field.
    """
    if config.looks_ahead:
        raise UserError(
            f"{config.looks_ahead[0]} lets tokens see later ones, which are not there yet while generating; "
            "train with a causal strategy and upper-case model.layers to generate"
        )
    moe = config.moe
    if config.moe_layers and isinstance(moe.routing, RoundRobin):
        raise UserError(
            f"model.moe.routing={moe.routing} routes by a token's place in its group, which decoding does "
            "not know; train with another strategy to generate"
        )
    # A controller's bias takes part in the choice of experts.
    steering = tuple(balancer for balancer in moe.balance if isinstance(balancer, Controller))
    moe = replace(moe, dispatch=Touched(), balance=steering, tokens_per_group=0)
    return replace(config, moe=moe)


def _quantized(params: nnx.State) -> bool:
    return any(isinstance(variable[...], QuantizedMatrix) for _, variable in nnx.to_flat_state(params))


def _untie(model: Transformer) -> None:
    """Give a model over quantised matrices an output head of its own, of eight bits as every head is there.

    At batch 1 reading a tied one in compute precision would take longer than all other layers.
    """
    head: Any = quantize(use(model.embedding, jnp.dtype("float32")).T, Format("int8"))
    with logical_rules():
        model.head = nnx.Param(head, out_sharding=HEAD)
    model.config = replace(model.config, tied_embedding=False)


def dropped_in_training(config: TransformerConfig) -> str:
    """What in a model dropped assignments while training, as decoding never does; "" where nothing did."""
    dispatch = config.moe.dispatch
    return f"model.moe.dispatch={dispatch}" if config.moe_layers and type(dispatch) is not Dropless else ""


def _used[Module: nnx.Module](module: Module, dtype: jnp.dtype) -> Module:
    """A module whose parameters are as its forward pass uses them, so that `use` has nothing left to do."""

    def laid_out(param: nnx.Param):
        axes = param.get_metadata("out_sharding")[-param.ndim :]
        kept = [axis if axis == "expert" else None for axis in axes]
        wide = param.dtype if FLOAT32_AXES & set(axes) else dtype
        return param.replace(use(param, wide, *kept))

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(laid_out, params, is_leaf=lambda node: isinstance(node, nnx.Param))
    return nnx.merge(graph, params, rest)
