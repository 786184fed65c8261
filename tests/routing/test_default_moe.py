"""Default MoE: absent experts add their mean output, in a layer and in the router's gradient."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx

from moe.balance import RoutingStatistics, totals
from moe.dispatch import Capacity, Dropless
from moe.errors import UserError
from moe.mesh import logical_rules, spec
from moe.nn import MoEConfig, MoELayer
from moe.routing import Context, DefaultMoE

TOKENS, EXPERTS, WIDTH, BATCH, K = 6, 5, 8, 8, 2
STRATEGY = DefaultMoE(K, decay=0.75)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_absent_experts_weigh_their_score():
    logits = normal(0, TOKENS, EXPERTS)
    context = Context(jnp.zeros(TOKENS, jnp.int32), jnp.ones(TOKENS, bool))
    routing = STRATEGY(logits, None, context)
    scores = naive.scores(logits.astype(np.float64), "softmax")
    for t in range(TOKENS):
        chosen = np.asarray(routing.expert).reshape(TOKENS, K)[t].tolist()
        weight = np.asarray(routing.combine_weight).reshape(TOKENS, K)[t]
        np.testing.assert_allclose(weight, scores[t, chosen], rtol=1e-5)
        absent = [0 if e in chosen else scores[t, e] for e in range(EXPERTS)]
        np.testing.assert_allclose(routing.default_weight[t], absent, rtol=1e-5)


def run_layer(dispatch, x, y_bar, mask, default):
    """Output, statistics of the batch, the router's gradient, parameters, and the state after the step."""
    config = MoEConfig(EXPERTS, 3, STRATEGY, (), dispatch)

    @jax.jit
    def run(x, y_bar, mask, default):
        with logical_rules():
            layer = MoELayer(config, WIDTH, out_std=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        layer.strategy_state["default_output"][...] = default
        layer.router.w[...] = layer.router.w[...].at[0, 4].set(-100.0)
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        token_id = jnp.zeros((BATCH, TOKENS), jnp.int32)
        token_id, mask, x, y_bar = jax.sharding.reshard((token_id, mask, x, y_bar), spec("batch"))

        keys = jax.random.split(jax.random.key(0), BATCH)

        def forward(params):
            return nnx.merge(graph, params, rest)(x, token_id, mask, keys)

        y, pullback, statistics = jax.vjp(forward, params, has_aux=True)
        (grads,) = pullback(y_bar)
        batch = jax.tree.map(lambda s: s[0], totals(jax.tree.map(lambda s: s[None], statistics)))
        after = STRATEGY.update_state({"default_output": default}, batch)
        return y, batch, grads["router"]["w"][...], params, after["default_output"]

    return jax.device_get(run(x, y_bar, mask, default))


@pytest.mark.parametrize("mesh", ["1x1", "8x1"], indirect=True)
def test_a_layer_is_the_loop_over_all_experts(mesh):
    """Output, router gradient and the next default outputs; expert 4 has no tokens and keeps its own."""
    x, y_bar, default = (
        normal(1, BATCH, TOKENS, WIDTH),
        normal(2, BATCH, TOKENS, WIDTH),
        normal(3, EXPERTS, WIDTH),
    )
    mask = np.random.default_rng(4).random((BATCH, TOKENS)) < 0.8
    x[..., 0] = 1.0
    y_bar[~mask] = 0
    y, batch, router_bar, params, after = run_layer(Dropless(tile=4), x, y_bar, mask, default)
    w = params["router"]["w"][...]
    weights = {name: params["experts"][name][...] for name in ("w_gate", "w_up", "w_down")}

    expected_bar = np.zeros_like(w, np.float64)
    total, load = np.zeros((EXPERTS, WIDTH)), np.zeros(EXPERTS)
    for b in range(BATCH):
        logits = x[b].astype(np.float64) @ w
        p, chosen = naive.scores(logits, "softmax"), naive.choose(logits, None, K, "softmax")
        for t in range(TOKENS):
            if not mask[b, t]:  # goes nowhere, and nothing follows from it
                continue
            outputs = default.astype(np.float64).copy()
            for e in chosen[t]:
                outputs[e] = naive.swiglu(x[b, t], *(weights[n][e] for n in ("w_gate", "w_up", "w_down")))
                total[e] += outputs[e]
                load[e] += 1
            np.testing.assert_allclose(y[b, t], p[t] @ outputs, rtol=1e-4, atol=1e-5)
            p_bar = outputs @ y_bar[b, t]
            expected_bar += np.outer(x[b, t], p[t] * (p_bar - p[t] @ p_bar))
    np.testing.assert_allclose(router_bar, expected_bar, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(batch.load, load)
    expected = [
        0.75 * default[e] + 0.25 * total[e] / load[e] if load[e] else default[e] for e in range(EXPERTS)
    ]
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_keeps_its_default_output():
    """In two layers at once."""
    names = ("score", "z", "entropy", "confidence", "dropped", "tokens")
    batch = RoutingStatistics(
        load=jnp.array([[4.0, 0.0], [0.0, 2.0]]),
        **dict.fromkeys(names, jnp.zeros(2)),
        observed={"output": jnp.array([[[8.0], [0.0]], [[0.0], [6.0]]])},
    )
    after = STRATEGY.update_state({"default_output": jnp.ones((2, 2, 1))}, batch)
    np.testing.assert_allclose(after["default_output"][..., 0], [[0.75 + 0.25 * 2, 1], [1, 0.75 + 0.25 * 3]])


@pytest.mark.parametrize("mesh", ["1x1"], indirect=True)
def test_dropped_assignments_count_as_outputs_of_zero(mesh):
    x, y_bar = normal(5, BATCH, TOKENS, WIDTH), normal(6, BATCH, TOKENS, WIDTH)
    mask, default = np.ones((BATCH, TOKENS), bool), np.zeros((EXPERTS, WIDTH), np.float32)
    _, batch, _, _, after = run_layer(Capacity(0.25), x, y_bar, mask, default)
    assert batch.dropped > 0
    assert batch.load.sum() == BATCH * TOKENS * K
    np.testing.assert_allclose(after, 0.25 * batch.observed["output"] / batch.load[:, None], rtol=1e-5)


def test_counts_and_refusals():
    assert DefaultMoE(3).experts_per_token(8) == 3
    with pytest.raises(UserError, match="k=9"):
        DefaultMoE(9).check(8)
    for decay in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"decay={decay}"):
            DefaultMoE(decay=decay).check(8)
