"""Padding has no say in any balancer: neither in losses, their gradients, nor in what controllers do."""

from dataclasses import MISSING, fields, is_dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe.balance
import moe.routing
from moe.balance import BalanceLoss, Balancer, Controller, ImportanceLoss, LossFreeBias, totals
from moe.dispatch import Dropless
from moe.errors import UserError
from moe.mesh import logical_rules
from moe.nn import MoEConfig, MoELayer
from moe.nn.free_experts import FreeExperts
from moe.routing import Strategy, TopK

WIDTH, BATCH, SEQUENCE = 6, 4, 8
BASE = MoEConfig(num_experts=8, expert_width=4, dispatch=Dropless(tile=4))


def public(module, kind):
    """Every subclass of `kind` that the package offers and that has defaults, with its defaults."""
    found = [getattr(module, name) for name in module.__all__]
    found = [c for c in found if is_dataclass(c) and issubclass(c, kind)]
    found = [c for c in found if c not in (kind, BalanceLoss, Controller)]
    return [c() for c in found if all((f.default, f.default_factory) != (MISSING,) * 2 for f in fields(c))]


def layer_with(balancer):
    """A layer with a strategy that goes together with the balancer."""
    for strategy in (TopK(), *public(moe.routing, Strategy)):
        for free in (0, 2):
            try:
                free_experts = FreeExperts(copy=free)
                return replace(BASE, routing=strategy, balance=(balancer,), free_experts=free_experts)
            except UserError:
                continue
    raise AssertionError(f"no public strategy goes together with {balancer}")


BALANCERS = [
    *public(moe.balance, Balancer),
    ImportanceLoss(summed="combine_weight"),
    LossFreeBias(momentum=0.5),
]


@pytest.mark.parametrize("balancer", BALANCERS, ids=str)
def test_padding_has_no_say(one_device, balancer):
    """The last tokens of each sequence are padding, and one sequence is nothing else."""
    config = layer_with(balancer)

    def build():
        return MoELayer(config, WIDTH, out_std=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    with logical_rules():
        graph, params, _ = nnx.split(jax.eval_shape(jax.jit(build)), nnx.Param, ...)
        state = jax.jit(lambda: nnx.state(build(), nnx.Not(nnx.Param)))()
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
    real = np.arange(SEQUENCE) < np.array([SEQUENCE, 5, 2, 0])[:, None]

    @jax.jit
    def outcome(params, x, token_id):
        def loss(params):
            layer = nnx.merge(graph, params, state, copy=True)
            _, statistics = layer(x, token_id, jnp.asarray(real), jax.random.split(jax.random.key(1), BATCH))
            statistics = jax.tree.map(lambda a: a[None], statistics)
            batch = jax.lax.stop_gradient(totals(statistics))
            layer.update_state(jax.tree.map(lambda a: a[0], batch))
            value = balancer(statistics, batch) if isinstance(balancer, BalanceLoss) else jnp.zeros(())
            return value, nnx.state(layer, nnx.Not(nnx.Param))

        return jax.value_and_grad(loss, has_aux=True)(params)

    x = random.normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32)
    token_id = random.integers(0, 9, (BATCH, SEQUENCE)).astype(np.int32)
    other = np.where(real[..., None], x, 5 * random.normal(size=x.shape)).astype(np.float32)
    expected = outcome(params, x, token_id)
    ours = outcome(params, other, np.where(real, token_id, 8))
    (value, after), gradient = expected
    if isinstance(balancer, Controller):
        assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True))
    else:
        assert np.isfinite(value)
        assert any(np.any(g) for g in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)
