"""Any router x strategy x balancer x dispatch x expert shape: it trains, or its config says why it cannot."""

from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import MESHES

import moe.balance
import moe.nn.router
import moe.routing
from moe.balance import Balancer
from moe.dispatch import Capacity, Dropless, OneHot
from moe.errors import UserError
from moe.mesh import MeshConfig, logical_rules, make_mesh, spec
from moe.nn import MoEConfig, MoELayer
from moe.nn.free_experts import FreeExperts
from moe.nn.router import Router
from moe.routing import Strategy, TokenRounding, TopK

EXPERTS, WIDTH, BATCH, SEQUENCE = 8, 8, 8, 16


def defaults(module, base):
    """Every public class of a room that can be made without arguments, made so."""
    names = getattr(module, "__all__", None) or vars(module)
    classes = [
        c for c in (getattr(module, name) for name in names) if isinstance(c, type) and is_dataclass(c)
    ]
    made = [c() for c in classes if issubclass(c, base) and all(f.default is not MISSING for f in fields(c))]
    return [x for x in made if type(x).__call__ is not base.__call__] if base is Strategy else made


STRATEGIES = [s for s in defaults(moe.routing, Strategy) if not isinstance(s, TokenRounding)]
STRATEGIES += [TokenRounding(tile=4)]  # the default's tile is larger than the groups here
ABSTRACT = {"Balancer", "BalanceLoss", "Controller", "Router"}
BALANCERS = [b for b in defaults(moe.balance, Balancer) if type(b).__name__ not in ABSTRACT]
ROUTERS = [r for r in defaults(moe.nn.router, Router) if type(r).__name__ not in ABSTRACT]
DISPATCHES = [Dropless(tile=4), Capacity(1.0), Capacity(0.75, "score"), OneHot(1.0)]
SHAPES = {
    "coarse": {},
    "shared": {"shared_experts": 1, "shared_gate": "sigmoid"},
    "residual": {"shared_experts": 1, "shared_width": 8, "shared_gate": "softmax"},
    "latent": {"latent_width": 4},
    "heterogeneous": {"expert_width": 4 * (4,) + 4 * (6,)},
    "free": {"free_experts": FreeExperts(zero=1, copy=1, constant=2)},
}


def combine(router, strategy, balancer, dispatch, shape):
    """The layer's config, or the UserError that refuses it."""
    config = {"num_experts": EXPERTS, "expert_width": 4, **SHAPES[shape]}
    balance = () if balancer is None else (balancer,)
    try:
        return MoEConfig(router=router, routing=strategy, balance=balance, dispatch=dispatch, **config)
    except UserError as error:
        return error


@cache
def combinations():
    """Everything: (choice, config or refusal)."""
    axes = (ROUTERS, STRATEGIES, [None, *BALANCERS], DISPATCHES, SHAPES)
    return [(choice, combine(*choice)) for choice in product(*axes)]


def test_what_cannot_combine_says_why_in_one_line():
    refused = {str(config) for _, config in combinations() if isinstance(config, UserError)}
    assert refused
    for reason in refused:
        assert reason.startswith("model.moe.") and "\n" not in reason, reason


def test_every_part_combines_with_top_k_and_every_strategy_with_every_dispatch_and_most_shapes():
    allowed = {choice for choice, config in combinations() if isinstance(config, MoEConfig)}
    by_type = {tuple(type(x).__name__ for x in choice[:3]) + choice[3:] for choice in allowed}
    top_k = [choice for choice in allowed if isinstance(choice[1], TopK)]
    assert {choice[0] for choice in top_k} == set(ROUTERS)
    assert {choice[3:] for choice in top_k} == set(product(DISPATCHES, SHAPES))
    for balancer in BALANCERS:
        assert any(choice[2] == balancer for choice in allowed), f"{balancer} combines with nothing"
    for strategy in STRATEGIES:
        name = type(strategy).__name__
        for dispatch, shape in product(DISPATCHES, ("coarse", "shared", "residual", "latent")):
            assert ("LinearRouter", name, "NoneType", dispatch, shape) in by_type, (name, dispatch, shape)


def sample():
    """Allowed combinations, drawn so that every part occurs with several others."""
    random = np.random.default_rng(0)
    allowed = [choice for choice, config in combinations() if isinstance(config, MoEConfig)]
    order = [allowed[i] for i in random.permutation(len(allowed))]
    seen, chosen = set(), []
    for choice in order:
        router, strategy, balancer, dispatch, shape = choice
        # Strategies against every dispatch and two balancers stand in routing/test_every_strategy.py.
        pairs = {("balancer", balancer, shape), ("router", router, shape), ("strategy", strategy)}
        pairs |= {("balancer", balancer, type(dispatch)), ("shape", shape, type(dispatch))}
        if len(pairs - seen) >= 4:
            seen |= pairs
            chosen.append(choice)
    return chosen


@pytest.mark.parametrize("choice", sample(), ids=lambda choice: "-".join(map(str, choice)))
def test_a_sample_takes_a_step(choice):
    """Output, statistics, gradients and fresh state are finite and shaped as they should be, on a mesh."""
    config = combine(*choice)
    fsdp, expert = MESHES["2x4"]
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=fsdp, expert=expert), jax.devices()[: fsdp * expert])):
        y, statistics, gradients, before, after = jax.device_get(step(config))
    assert y.shape == (BATCH, SEQUENCE, WIDTH)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, statistics, gradients, after)))
    assert np.any(y)
    assert jax.tree.map(np.shape, before) == jax.tree.map(np.shape, after)
    np.testing.assert_array_equal(statistics.tokens, SEQUENCE - np.arange(BATCH))
    capacity = getattr(config.dispatch, "capacity_factor", None)
    if capacity is None:
        assert not np.any(statistics.dropped)
    assert (statistics.dropped <= statistics.load.sum(-1) + 1e-3).all()


def step(config):
    """One layer's output, statistics, gradients of output and balance, and its state before and after."""

    def build():
        return MoELayer(config, WIDTH, out_std=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    with logical_rules():
        graph, like, _ = nnx.split(jax.eval_shape(jax.jit(build)), nnx.Param, ...)
        rest = jax.jit(lambda: nnx.state(build(), nnx.Not(nnx.Param)))()
    random, mesh = np.random.default_rng(1), jax.sharding.get_mesh()

    def draw(p):  # a program that draws them takes as long to compile as the layer's forward pass
        value = 0.3 * random.normal(size=p.shape).astype(np.float32)
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, p.sharding.spec))

    params = jax.tree.map(draw, like)
    x, y_bar = (random.normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32) for _ in range(2))
    token_id = random.integers(0, 50, (BATCH, SEQUENCE)).astype(np.int32)
    mask = np.arange(SEQUENCE) < SEQUENCE - np.arange(BATCH)[:, None]  # padding, but for the first sequence
    x, y_bar, token_id, mask = jax.device_put(
        (x, y_bar, token_id, mask), jax.sharding.NamedSharding(mesh, spec("batch"))
    )

    @jax.jit
    def run(params, rest, x):
        keys = jax.random.split(jax.random.key(0), BATCH)

        def loss(params, x):
            y, statistics = nnx.merge(graph, params, rest)(x, token_id, mask, keys)
            stacked = jax.tree.map(lambda s: s[None], statistics)
            batch = jax.lax.stop_gradient(moe.balance.totals(stacked))
            losses = [b(stacked, batch) for b in config.balance if isinstance(b, moe.balance.BalanceLoss)]
            return jnp.sum(y * y_bar) + sum(losses, start=jnp.zeros(())), (y, statistics, batch)

        gradients, (y, statistics, batch) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        layer = nnx.merge(graph, params, rest, copy=True)
        layer.update_state(jax.tree.map(lambda s: s[0], batch))
        return y, statistics, gradients, nnx.state(layer, nnx.Not(nnx.Param))

    y, statistics, gradients, after = run(params, rest, x)
    return y, replace(statistics, observed={}), gradients, rest, after
