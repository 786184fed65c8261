"""What every routing strategy must hold, alone and in a layer with each dispatch and balancer.

Runs for all public strategies of `moe.routing`, or for one of your own:
`pytest tests/routing/test_every_strategy.py --strategy "my_router.Exploring(k=2)"`.
"""

from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import MESHES

import moe.routing
from moe.balance import LoadBalanceLoss, LossFreeBias, ZLoss
from moe.config.expression import parse_expression
from moe.dispatch import Capacity, Dropless
from moe.errors import UserError
from moe.mesh import MeshConfig, logical_rules, make_mesh, spec
from moe.nn import MoEConfig, MoELayer
from moe.routing import Blending, Context, Strategy

TOKENS, EXPERTS = 12, 8
WIDTH, BATCH = 8, 8


def pytest_generate_tests(metafunc):
    if "strategy" not in metafunc.fixturenames:
        return
    own = metafunc.config.getoption("--strategy")
    chosen = [parse_expression(own, Strategy, "--strategy")] if own else public_strategies()
    if "dispatch" not in metafunc.fixturenames:
        metafunc.parametrize("strategy", chosen, ids=str)
        return
    # One's own strategy meets every layer; of the many public ones each meets two, to save compilations.
    halves = [LAYERS] if own else [LAYERS[::3], LAYERS[1:3]]
    pairs = [(s, *layer) for i, s in enumerate(chosen) for layer in halves[i % len(halves)]]
    metafunc.parametrize(("strategy", "dispatch", "balance", "name"), pairs, ids=str)


def public_strategies():
    """Every strategy of assignments that the package offers and that has defaults, with its defaults."""
    found = [getattr(moe.routing, name) for name in moe.routing.__all__]
    found = [c for c in found if is_dataclass(c) and issubclass(c, Strategy)]
    found = [c for c in found if c.__call__ is not Strategy.__call__ and not issubclass(c, Blending)]
    return [c() for c in found if all(f.default is not MISSING for f in fields(c))]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def context_of(strategy, seed=None):
    """All that a strategy may look at, for one group: in evaluation, or in training with a seed."""
    return Context(
        token_id=jnp.arange(TOKENS, dtype=jnp.int32),
        mask=jnp.ones(TOKENS, bool),
        key=None if seed is None else jax.random.key(seed),
        x=jnp.asarray(normal(4, TOKENS, WIDTH)),
        parameters=random_parameters(strategy),
        state=strategy.initial_state(WIDTH, EXPERTS),
    )


def random_parameters(strategy):
    """Parameters like those that the strategy begins with, but not zero."""
    like = strategy.parameters(jax.random.key(0), WIDTH, EXPERTS)
    return {name: value + 0.3 * normal(5, *value.shape) for name, value in like.items()}


@partial(jax.jit, static_argnums=0)
def route(strategy, logits, bias, context):
    return strategy(logits, bias, context)


@partial(jax.jit, static_argnums=0)
def gradient(strategy, logits, bias, context):
    """Of everything that carries one, weighed so that sums to one do not hide it."""

    def total(logits, parameters):
        routing = strategy(logits, bias, replace(context, parameters=parameters))
        carriers = [routing.combine_weight, routing.scores, *routing.observed.values()]
        weighed = [jnp.arange(1.0, x.size + 1) * x.reshape(-1) for x in carriers]
        return sum(x.sum() for x in weighed)

    return jax.grad(total, argnums=(0, 1))(logits, context.parameters)


@given(seed=st.integers(0, 2**16), key=st.none() | st.integers(0, 9), biased=st.booleans())
@settings(max_examples=30)
def test_assignments_are_well_formed(strategy, seed, key, biased):
    bias = normal(seed + 1, EXPERTS) if biased and strategy.takes_bias else None
    routing = route(strategy, normal(seed, TOKENS, EXPERTS), bias, context_of(strategy, key))

    assert routing.token.shape == routing.expert.shape == routing.combine_weight.shape
    assert jnp.issubdtype(routing.token.dtype, jnp.integer)
    assert jnp.issubdtype(routing.expert.dtype, jnp.integer)
    assert ((routing.token >= 0) & (routing.token < TOKENS)).all()
    assert ((routing.expert >= 0) & (routing.expert <= EXPERTS)).all()
    assert jnp.isfinite(routing.combine_weight).all()
    assert routing.combine_weight.dtype == jnp.float32
    assert routing.scores.shape == (TOKENS, EXPERTS)
    np.testing.assert_allclose(routing.scores.sum(-1), 1, rtol=1e-5)
    pairs = [
        (t, e) for t, e in zip(routing.token.tolist(), routing.expert.tolist(), strict=True) if e < EXPERTS
    ]
    assert len(pairs) == len(set(pairs)), "a token goes to an expert once"
    if routing.per_token is not None:
        np.testing.assert_array_equal(routing.token, np.repeat(np.arange(TOKENS), routing.per_token))
    if routing.chosen is not None:
        assert routing.chosen.shape == routing.expert.shape
    if routing.default_weight is not None:
        assert routing.default_weight.shape == (TOKENS, EXPERTS)
        assert "default_output" in strategy.initial_state(WIDTH, EXPERTS)
    assert set(routing.observed) == set(strategy.observes)


def test_gradients_reach_what_is_learned_and_stay_finite(strategy):
    bias = np.zeros(EXPERTS, np.float32) if strategy.takes_bias else None
    parameters = strategy.parameters(jax.random.key(0), WIDTH, EXPERTS)
    context = context_of(strategy, seed=3)
    to_logits, to_parameters = gradient(strategy, normal(0, TOKENS, EXPERTS), bias, context)
    assert np.any(to_logits) == strategy.routes_by_logits
    for name in parameters:
        assert np.any(to_parameters[name]), name
    for extreme in (1e4, -1e4):
        for logits in (np.full((TOKENS, EXPERTS), extreme), extreme * np.eye(TOKENS, EXPERTS)):
            for each in (context, context_of(strategy)):
                gradients = gradient(strategy, logits.astype(np.float32), bias, each)
                assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_randomness_comes_from_the_key_alone(strategy):
    context = context_of(strategy, seed=7)
    logits = normal(0, TOKENS, EXPERTS)
    first, second = route(strategy, logits, None, context), strategy(logits, None, context)
    np.testing.assert_array_equal(first.expert, second.expert)
    np.testing.assert_allclose(first.combine_weight, second.combine_weight, rtol=1e-5)


@given(seed=st.integers(0, 2**16), changed=st.integers(1, TOKENS - 1))
@settings(max_examples=20)
def test_a_causal_strategy_does_not_look_ahead(strategy, seed, changed):
    """In evaluation, where a strategy that balances a batch while training routes each token by itself."""
    if not strategy.causal:
        pytest.skip("says that it is not causal")
    logits = normal(seed, TOKENS, EXPERTS)
    other = logits.copy()
    other[changed:] = normal(seed + 1, TOKENS - changed, EXPERTS)
    context = context_of(strategy)
    assert (
        seen_by_tokens(strategy, logits, context)[:changed]
        == seen_by_tokens(strategy, other, context)[:changed]
    )


@given(seed=st.integers(0, 2**16), training=st.booleans(), padding=st.integers(1, TOKENS - 1))
@settings(max_examples=20)
def test_padding_has_no_say(strategy, seed, training, padding):
    """What stands in padding changes no other token's route, wherever the strategy looks at many tokens."""
    context = context_of(strategy, seed=1 if training else None)
    mask = np.arange(TOKENS) < TOKENS - padding
    context = replace(context, mask=jnp.asarray(mask))
    logits = normal(seed, TOKENS, EXPERTS)
    other = np.where(mask[:, None], logits, normal(seed + 1, TOKENS, EXPERTS))
    first, second = (seen_by_tokens(strategy, x, context) for x in (logits, other))
    assert first[: TOKENS - padding] == second[: TOKENS - padding]


def seen_by_tokens(strategy, logits, context):
    """For each token its experts with their weights."""
    routing = route(strategy, logits, None, context)
    assignments = zip(*map(np.asarray, (routing.token, routing.expert, routing.combine_weight)), strict=True)
    found = [set() for _ in range(TOKENS)]
    for token, expert, weight in assignments:
        if expert < EXPERTS:
            found[token].add((int(expert), round(float(weight), 4)))
    return found


def test_counts_and_checks(strategy):
    strategy.check(EXPERTS)
    active, trained = strategy.experts_per_token(EXPERTS), strategy.trained_experts_per_token(EXPERTS)
    assert 0 < active <= trained <= EXPERTS


LAYERS = [
    (Dropless(tile=4), (LoadBalanceLoss(), ZLoss()), "1x1"),
    (Dropless(tile=4), (LossFreeBias(),), "4x2"),
    (Capacity(0.75, "position"), (LossFreeBias(),), "1x1"),
    (Capacity(0.75, "score"), (LoadBalanceLoss(sequences_per_group=1),), "4x2"),
]


def test_a_layer_is_the_loop_over_its_assignments(strategy, dispatch, balance, name):
    """Output and load; with randomness, which the loop does not know, gradients are finite."""
    config = combined(strategy, dispatch, balance)
    fsdp, expert = MESHES[name]
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=fsdp, expert=expert), jax.devices()[: fsdp * expert])):
        p, forward, backward = make_layer(config)
        x, y_bar = normal(1, BATCH, TOKENS, WIDTH), normal(2, BATCH, TOKENS, WIDTH)
        bias = normal(3, EXPERTS) if config.controller else np.zeros(EXPERTS, np.float32)
        y, statistics = jax.device_get(forward(p, bias, x))
        gradients = backward(p, bias, x, y_bar, jax.random.split(jax.random.key(0), BATCH))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))

    weights = {name: np.asarray(p["experts"][name][...]) for name in ("w_gate", "w_up", "w_down")}
    load = np.zeros((BATCH, EXPERTS))
    for b in range(BATCH):
        routing = route(strategy, *layer_inputs(config, p, x[b], bias))
        token, expert, weight = map(np.asarray, (routing.token, routing.expert, routing.combine_weight))
        kept = expert < EXPERTS
        if isinstance(dispatch, Capacity):
            rule = (dispatch.capacity_factor, dispatch.priority)
            kept = naive.kept(expert, weight, routing.per_token, EXPERTS, *rule)
        expected, *_ = naive.experts(x[b], token, expert, weight, kept, weights, y_bar[b])
        np.testing.assert_allclose(y[b], expected, rtol=1e-4, atol=1e-3)
        counted = expert < EXPERTS
        if routing.chosen is not None:
            counted &= np.asarray(routing.chosen)
        load[b] = np.bincount(expert[counted], minlength=EXPERTS)
    np.testing.assert_array_equal(statistics.load, load)


def combined(strategy, dispatch, balance):
    """The layer's config; without the balancers where the strategy has nothing for them to act on."""
    try:
        return MoEConfig(EXPERTS, 5, strategy, balance, dispatch)
    except UserError:
        assert not (strategy.takes_bias and strategy.routes_by_logits)
        return MoEConfig(EXPERTS, 5, strategy, (), dispatch)


def layer_inputs(config, p, x, bias):
    """Logits, bias and context that the layer gives its strategy for one sequence."""
    logits = np.zeros((TOKENS, EXPERTS), np.float32)
    if config.routing.routes_by_logits:
        logits = jnp.asarray(x) @ p["router"]["w"][...]
    trained = {name: value[...] for name, value in p.get("strategy", {}).items()}
    context = replace(context_of(config.routing), x=jnp.asarray(x), parameters=trained)
    return logits, bias if config.controller else None, context


def make_layer(config):
    """Random parameters, and two compiled functions: (params, bias, x) -> (y, statistics) in evaluation,
    (params, bias, x, y_bar, keys) -> gradients in training."""

    def build():
        return MoELayer(config, WIDTH, out_std=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    with logical_rules():
        graph, like, rest = nnx.split(jax.eval_shape(jax.jit(build)), nnx.Param, ...)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), like)
    remembered = config.routing.initial_state(WIDTH, EXPERTS)

    def state(path, _, bias):
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return bias if names[0] == "controller_state" else remembered[names[1]]

    @jax.jit
    def forward(params, bias, x, keys=None):
        token_id = jnp.tile(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, 1))
        token_id, mask = jax.sharding.reshard((token_id, jnp.ones_like(token_id, bool)), spec("batch"))
        states = jax.tree_util.tree_map_with_path(partial(state, bias=jnp.asarray(bias)), rest)
        laid_out = jax.tree.map(lambda p, v: jax.sharding.reshard(v, p.sharding.spec), like, params)
        x = jax.sharding.reshard(x, spec("batch"))
        return nnx.merge(graph, laid_out, states)(x, token_id, mask, keys)

    @jax.jit
    def backward(params, bias, x, y_bar, keys):
        _, pullback = jax.vjp(lambda params, x: forward(params, bias, x, keys)[0], params, x)
        return pullback(jax.sharding.reshard(y_bar, spec("batch")))

    return params, forward, backward
