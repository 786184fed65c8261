"""The mixture-of-experts layer: router, strategy, dispatch, experts, combine."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from moe.balance import GroupView, RoutingStatistics, measure
from moe.dispatch import Dispatched
from moe.kernels import from_groups, merge, to_groups
from moe.mesh import spec
from moe.nn.blending import blend
from moe.nn.feed_forward import SWIGLU_EXPERTS, Experts, MixedExperts
from moe.nn.free_experts import FreeExpertLayer
from moe.nn.latent_projection import LatentProjection
from moe.nn.moe_config import MoEConfig
from moe.nn.parameter import use
from moe.nn.shared_experts import SharedExperts
from moe.routing import Blend, Context, Routing


class BalanceState(nnx.Variable):
    """State of a controller or of a strategy: no parameter, updated by the train step from the statistics."""


class MoELayer(nnx.Module):
    """Every token through its chosen experts, and through the shared ones."""

    def __init__(self, config: MoEConfig, width: int, *, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        expert_input, shape = config.latent_width or width, {"out_std": out_std, "dtype": dtype, "rngs": rngs}
        if config.routing.routes_by_logits:
            self.router = config.router.build(width, config.num_choices, rngs=rngs)
        if config.latent_width:
            self.latent = LatentProjection(width, config.latent_width, dtype=dtype, rngs=rngs)
        if len(config.width_classes) == 1:
            self.experts = Experts(*config.width_classes[0], expert_input, **shape)
        else:
            self.experts = MixedExperts(config.width_classes, expert_input, **shape)
        if config.free_experts.count:
            self.free = FreeExpertLayer(
                config.free_experts, config.num_experts, width, dtype=dtype, rngs=rngs
            )
        if config.shared_experts:
            self.shared = SharedExperts(width, config.shared_hidden, config.shared_gate, **shape)

        trained = config.routing.parameters(rngs.params(), width, config.num_choices)
        self.strategy = nnx.Dict({name: _small_parameter(value) for name, value in trained.items()})
        self.strategy_state = _state(config.routing.initial_state(width, config.num_choices))
        if config.controller:
            self.controller_state = _state(
                config.controller.initial(config.num_choices, config.free_experts.count)
            )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        token_id: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        keys: Key[Array, "B"] | None = None,
        layer: Int[ArrayLike, ""] = 0,
    ) -> tuple[Float[Array, "B S D"], RoutingStatistics]:
        """Apply the layer.

        Args:
            x: tokens.
            token_id: their vocabulary ids.
            mask: False for padding, which statistics leave out.
            keys: randomness of this step while training, one key a sequence.
            layer: index of this layer among the MoE layers.

        Returns:
            The layer's output, and the statistics of its routing.
        """
        batch, sequence, _ = x.shape
        groups, tokens = self.config.group_shape(batch, sequence)
        grouped, ids, group_mask = (to_groups(a, tokens) for a in (x, token_id, mask))
        keys = None if keys is None else _group_keys(keys, groups, layer)
        logits = self._logits(grouped)
        routing = self._route(grouped, logits, ids, group_mask, keys, layer)
        y, dropped, outputs = self._experts(grouped, routing)
        if routing.default_weight is not None:
            default = self.strategy_state["default_output"][...].astype(self.dtype)
            y = y + jnp.einsum("gte,ed->gtd", routing.default_weight.astype(self.dtype), default)
        y = from_groups(y, batch, spec("batch", "sequence"))
        if self.config.shared_experts:
            y = self.shared.join(x, y)
        routing = self._observe(routing, logits, group_mask, outputs)
        return y, measure(routing, logits, dropped, mask)

    def update_state(self, batch: RoutingStatistics) -> None:
        """Let strategy and controller answer a step's statistics, summed over the batch: fields [..., E]."""
        fresh = self.config.routing.update_state(_values(self.strategy_state), batch)
        _assign(self.strategy_state, fresh)
        if self.config.controller:
            _assign(
                self.controller_state, self.config.controller.update(_values(self.controller_state), batch)
            )

    def _logits(self, grouped):
        if self.config.routing.routes_by_logits:
            return self.router(grouped)
        shape = (*grouped.shape[:2], self.config.num_choices)
        return jnp.zeros(shape, jnp.float32, out_sharding=spec("group"))

    def _bias(self):
        return self.controller_state["bias"][...] if self.config.controller else None

    def _route(self, grouped, logits, ids, mask, keys, layer) -> Routing:
        bias = self._bias()
        trained = {name: _as_given(p) for name, p in self.strategy.items()}
        state = _values(self.strategy_state)

        def one_group(x, logits, ids, mask, key):
            context = Context(ids, mask, key, x, layer, trained, state)
            routing = self.config.routing(logits, bias, context)
            # Padding is sent nowhere.
            return replace(
                routing, expert=jnp.where(mask[routing.token], routing.expert, self.config.num_choices)
            )

        axes = (0, 0, 0, 0, None if keys is None else 0)
        return jax.vmap(one_group, in_axes=axes)(grouped, logits, ids, mask, keys)

    def _experts(self, grouped, routing: Routing) -> Dispatched:
        """What the routed experts, free ones included, give for each token."""
        latent = self.latent.down(grouped) if self.config.latent_width else grouped
        if isinstance(routing, Blend) and isinstance(self.experts, Experts):
            y, dropped, outputs = blend(latent, routing, self.experts.weights(), SWIGLU_EXPERTS)
        else:
            y, dropped, outputs = self.experts(
                latent,
                routing,
                self.config.dispatch,
                self.config.num_choices,
                keep_outputs=self.config.needs_outputs,
            )
        if self.config.latent_width:
            y, outputs = self.latent.up(y), None if outputs is None else self.latent.up(outputs)
        if self.config.free_experts.count:
            y = y + self.free(grouped, routing)
            outputs = None if outputs is None else outputs + self.free.outputs(grouped, routing)
        return Dispatched(y, dropped, outputs)

    def _observe(self, routing: Routing, logits, mask, outputs) -> Routing:
        """`routing` with all that the strategy and the balancers want summed up."""
        matrix = self.router.matrix() if self.config.routing.routes_by_logits else None
        bias = self._bias()

        def one_group(routing, logits, mask, outputs):
            observed = dict(routing.observed)
            if self.config.routing.needs_outputs:
                observed["output"] = _sum_by_expert(routing, outputs, logits.shape[-1], mask)
            view = GroupView(routing, logits, mask, bias, matrix, outputs)
            for balancer in self.config.balance:
                observed |= balancer.observe(view)
            return observed

        in_axes = (0, 0, 0, None if outputs is None else 0)
        observed = jax.vmap(one_group, in_axes=in_axes)(routing, logits, mask, outputs)
        return replace(routing, observed=observed)


def _group_keys(keys: Key[Array, "B"], groups: int, layer) -> Key[Array, "groups"]:
    """A group's key is that of its first sequence, folded with the layer and the group's number in it."""
    parts = max(groups // len(keys), 1)
    first = jnp.broadcast_to(keys[:: max(len(keys) // groups, 1), None], (groups // parts, parts))
    number = jnp.broadcast_to(jnp.arange(parts), first.shape)
    first, number = jax.sharding.reshard((first, number), spec("batch", "sequence"))
    fold = jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, layer), n))
    return fold(merge(first), merge(number))


def _small_parameter(value) -> nnx.Param:
    """Whole on every device; for optimizers matrices count as the router's, vectors and scalars as scales."""
    axes = ("norm",) if value.ndim < 2 else ("router", *[None] * (value.ndim - 1))
    return nnx.Param(jnp.atleast_1d(value), out_sharding=axes, scalar=value.ndim == 0)


def _as_given(param: nnx.Param):
    """The value in the shape that the strategy gave it."""
    value = use(param, jnp.dtype("float32"))
    return value[0] if param.get_metadata("scalar") else value


def _state(values) -> nnx.Dict:
    return nnx.Dict(
        {name: BalanceState(value, out_sharding=(None,) * value.ndim) for name, value in values.items()}
    )


def _values(state: nnx.Dict) -> dict[str, Array]:
    return {name: variable[...] for name, variable in state.items()}


def _assign(state: nnx.Dict, values: dict[str, Array]) -> None:
    for name, value in values.items():
        state[name][...] = value


def _sum_by_expert(routing: Routing, outputs, experts: int, mask):
    """[A, D] -> [E, D], padding left out."""
    counted = jnp.where(mask[routing.token][:, None], outputs, 0).astype(jnp.float32)
    return jax.ops.segment_sum(counted, routing.expert, num_segments=experts)
