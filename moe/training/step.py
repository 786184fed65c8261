"""One training step and one evaluation step, compiled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe.balance import RoutingStatistics, load_fraction, max_violation, totals
from moe.mesh import spec
from moe.nn import Transformer
from moe.training.loss import LossParts, evaluation_parts, training_loss
from moe.training.state import TrainState

Metrics = dict[str, Array]

Pretend = Callable[[nnx.State, Int[Array, ""], Key[Array, ""]], nnx.State]
"""From parameters, step and the step's key to other parameters."""


def make_train_step(
    graph: nnx.GraphDef,
    transformation: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    chunks: int = 1,
    average_decay: float = 0.0,
    pretend: Pretend | None = None,
) -> Callable[[TrainState, Key[Array, ""], Int[Array, "B S+1"], Int[Array, "B"], int], tuple]:
    """Build the compiled step: (state, key, tokens, slice of each row, number of slices) -> (state, metrics).

    `key` is the run's, the same at every step: the step folds its number in, and gives every row of the batch
    a key of its own.

    The state given is donated. What the step computes does not depend on the layout: losses and controllers
    see the whole batch, whether it lies on one device or many and whether it is taken at once or in
    `accumulation` parts.

    Args:
        graph: structure of the model.
        transformation: the optimizer.
        accumulation: micro-batches of a batch; gradients are averaged in float32.
        chunks: see `linear_cross_entropy`.
        average_decay: decay of the parameters' moving average; 0 where there is none.
        pretend: what forward passes see in the place of the parameters, differentiable; None: themselves.
    """

    def step(state: TrainState, key, tokens, slices, num_slices: int):
        key = jax.random.fold_in(key, state.step)
        keys = jax.random.split(key, len(tokens))

        def merge(params) -> Transformer:
            seen = params if pretend is None else pretend(params, state.step, key)
            return nnx.merge(graph, seen, state.controllers)

        loss, parts, grads = gradients(merge, state, tokens, keys, accumulation=accumulation, chunks=chunks)

        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        # The optimizer is written without regard to the mesh; XLA lays it out, to the shardings it came with.
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state.optimizer))
        update = jax.sharding.auto_axes(out_sharding=shardings)(transformation.update)
        updates, optimizer = update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = jax.tree.map(lambda a, p: a + (1 - average_decay) * (p - a), average, params)
        controllers = _update_controllers(graph, state, parts.statistics)

        fresh = (params, controllers, optimizer, average)
        stale = (state.params, state.controllers, state.optimizer, state.average)
        params, controllers, optimizer, average = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), fresh, stale
        )
        bad = (~good).astype(jnp.int32)
        after = TrainState(
            step=state.step + 1,
            params=params,
            controllers=controllers,
            optimizer=optimizer,
            average=average,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
        )
        model: Transformer = nnx.merge(graph, params, controllers)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "skipped": after.skipped,
            "skipped_in_a_row": after.skipped_in_a_row,
            **_loss_metrics(parts, slices, num_slices),
            **routing_metrics(parts.statistics, model.config.moe.num_experts),
            **_controller_metrics(model),
        }
        return after, jax.tree.map(lambda m: jax.sharding.reshard(m, spec()), metrics)

    return jax.jit(step, static_argnums=4, donate_argnums=0)


def gradients(
    merge: Callable[[nnx.State], Transformer],
    state: TrainState,
    tokens: Int[Array, "B S+1"],
    keys: Key[Array, "B"],
    *,
    accumulation: int,
    chunks: int,
) -> tuple[Float[Array, ""], LossParts, nnx.State]:
    """Loss, its parts over the whole batch, and gradients, in `accumulation` micro-batches.

    `merge` makes the model of parameters.
    """

    def loss(params, tokens, batch, keys):
        return training_loss(merge(params), tokens, batch, keys, chunks=chunks)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if accumulation == 1:
        (value, parts), grads = value_and_grad(state.params, tokens, None, keys)
        return value, parts, grads

    micro = jax.sharding.reshard(
        jax.sharding.reshard(tokens, spec()).reshape(accumulation, -1, tokens.shape[1]), spec(None, "batch")
    )
    keys = keys.reshape(accumulation, -1)
    counted = merge(state.params).config.counts_first(accumulation)
    batch = _batch_statistics(merge, state, micro, keys) if counted else None

    def accumulate(total, xs):
        (value, parts), grads = value_and_grad(state.params, xs[0], batch, xs[1])
        return jax.tree.map(jnp.add, total, grads), (value, parts)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, (values, parts) = jax.lax.scan(accumulate, zeros, (micro, keys))
    grads = jax.tree.map(lambda g: g / accumulation, grads)
    return values.mean(), _join(parts), grads


def _batch_statistics(merge, state: TrainState, micro, keys) -> RoutingStatistics:
    """Mean of the micro-batches' totals."""

    def count(xs):
        _, statistics = merge(state.params)(xs[0][:, :-1], keys=xs[1])
        return totals(statistics)

    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(count, (micro, keys)))


def _join(parts: LossParts) -> LossParts:
    """Parts of the micro-batches, stacked in front, as parts of the whole batch."""

    def rows(x):  # [accumulation, B, ...] -> [B, ...]
        return jax.sharding.reshard(x, spec()).reshape(-1, *x.shape[2:])

    statistics = jax.tree.map(lambda x: jax.vmap(rows, 1)(x), parts.statistics)
    return LossParts(rows(parts.nll), rows(parts.targets), parts.balance.mean(), statistics)


def _update_controllers(graph, state: TrainState, statistics: RoutingStatistics | None) -> nnx.State:
    if statistics is None:
        return state.controllers
    # A copy, for the update writes into the model's variables and a skipped step keeps the old ones.
    model: Transformer = nnx.merge(graph, state.params, state.controllers, copy=True)
    model.update_controllers(totals(statistics))
    return nnx.state(model, nnx.Not(nnx.Param))


def _loss_metrics(parts: LossParts, slices: Int[Array, "B"], num_slices: int) -> Metrics:
    nll, targets, slices = jax.sharding.reshard((parts.nll, parts.targets, slices), spec())
    member = jax.nn.one_hot(slices, num_slices)
    return {
        "cross_entropy": nll.sum() / targets.sum(),
        "balance_loss": parts.balance,
        "slice_nll": nll @ member,
        "slice_targets": targets @ member,
    }


def routing_metrics(statistics: RoutingStatistics | None, num_experts: int) -> Metrics:
    """Each layer's routing over the whole batch: arrays [L], and the load [L, E] relative to balance.

    `experts_per_token` counts the first `num_experts` only: those behind them are free.
    """
    if statistics is None:
        return {}
    total = totals(statistics)
    tokens = jnp.maximum(total.tokens, 1.0)
    replayed = total.observed.get("replayed")
    assignments = jnp.maximum(total.load.sum(-1), 1.0)
    return {
        "load": load_fraction(total.load),
        "max_violation": max_violation(total.load),
        "entropy": total.entropy / tokens,
        "confidence": total.confidence / tokens,
        "z": total.z / tokens,
        "dropped_fraction": total.dropped / assignments,
        "experts_per_token": total.load[:, :num_experts].sum(-1) / tokens,
        **({} if replayed is None else {"replayed_fraction": replayed / tokens}),
    }


def _controller_metrics(model: Transformer) -> Metrics:
    has_bias = model.config.moe_layers and model.config.moe.controller
    return {"bias_norm": model.bias_norms()} if has_bias else {}


def make_eval_step(graph: nnx.GraphDef, *, chunks: int = 1) -> Callable[..., Metrics]:
    """Build the compiled evaluation of one batch of one slice: sums that add up over batches.

    (params, controllers, tokens [B, S+1], weight [B, S], token_bytes [V]) -> nll and text bytes of all
    targets, their number, and the routing statistics summed over the batch [L, ...].
    """

    def step(params, controllers, tokens, weight, token_bytes):
        parts = evaluation_parts(nnx.merge(graph, params, controllers), tokens, weight, chunks=chunks)
        targets = token_bytes.at[tokens[:, 1:]].get(out_sharding=spec("batch"))
        sums = {
            "nll": parts.nll.sum(),
            "targets": parts.targets.sum(),
            "bytes": jnp.sum(targets * weight),
            "routing": jax.tree.map(lambda x: x.sum(1), parts.statistics),
        }
        return jax.tree.map(lambda x: jax.sharding.reshard(x, spec()), sums)

    return jax.jit(step)
