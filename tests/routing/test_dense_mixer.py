"""DenseMixer: output and experts' gradients of top-k, and a router gradient from all experts."""

from functools import partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.dispatch import Dropless
from moe.errors import UserError
from moe.mesh import logical_rules, spec
from moe.nn import MoEConfig, MoELayer
from moe.routing import Context, DenseMixer, TopK

TOKENS, EXPERTS, WIDTH, BATCH, K = 6, 5, 4, 2, 2
STRATEGIES = [DenseMixer(K), DenseMixer(3, renormalize=False), DenseMixer(K, scores="sigmoid")]


def context_of(seed):
    return Context(jnp.zeros(TOKENS, jnp.int32), jnp.ones(TOKENS, bool), jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def route(strategy, logits, bias):
    return strategy(logits, bias, context_of(0))


@partial(jax.jit, static_argnums=0)
def gradient(strategy, logits, weight_bar):
    return jax.grad(lambda z: strategy(z, None, context_of(0)).combine_weight @ weight_bar)(logits)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense_weights(logits, chosen, function, renormalize):
    """[T, E], as the authors write them, complex logits too: the divisor of absent experts is constant."""
    scores = naive.scores(logits, function)
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, chosen, True, axis=1)
    total = np.where(mask, scores, 0).sum(1, keepdims=True) if renormalize else np.ones((len(logits), 1))
    return np.where(mask, scores / total, scores / total.real)


def dense_gradient(logits, chosen, weight_bar, *rule):
    """Of sum(dense_weights * weight_bar), by a complex step."""
    expected = np.zeros(logits.shape)
    for place in np.ndindex(*logits.shape):
        moved = logits.astype(complex)
        moved[place] += 1e-30j
        expected[place] = (dense_weights(moved, chosen, *rule).imag * weight_bar).sum() / 1e-30
    return expected


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@given(seed=st.integers(0, 2**16), biased=st.booleans())
@settings(max_examples=15)
def test_what_counts_is_top_k_to_the_bit(strategy, seed, biased):
    logits, bias = normal(seed, TOKENS, EXPERTS), normal(seed + 1, EXPERTS) if biased else None
    routing = route(strategy, logits, bias)
    top = route(TopK(strategy.k, strategy.scores, strategy.renormalize), logits, bias)
    chosen = np.asarray(routing.chosen)
    np.testing.assert_array_equal(chosen.reshape(TOKENS, EXPERTS).sum(1), strategy.k)
    for name in ("token", "expert", "combine_weight"):
        np.testing.assert_array_equal(np.asarray(getattr(routing, name))[chosen], getattr(top, name))
    np.testing.assert_array_equal(np.asarray(routing.combine_weight)[~chosen], 0)
    np.testing.assert_array_equal(np.sort(routing.expert.reshape(TOKENS, EXPERTS)), TOKENS * [range(EXPERTS)])


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_the_gradient_is_that_of_the_authors_dense_weights(strategy, seed):
    logits, by_expert = normal(seed, TOKENS, EXPERTS), normal(seed + 1, TOKENS, EXPERTS)
    expert = np.asarray(route(strategy, logits, None).expert).reshape(TOKENS, EXPERTS)
    weight_bar = np.take_along_axis(by_expert, expert, axis=1).reshape(-1)
    rule = (strategy.scores, strategy.renormalize)
    expected = dense_gradient(logits.astype(np.float64), expert[:, : strategy.k], by_expert, *rule)
    np.testing.assert_allclose(gradient(strategy, logits, weight_bar), expected, rtol=1e-4, atol=1e-5)


def run_layer(strategy, x, y_bar):
    """Output, load, and gradients by name of a layer in training."""
    config = MoEConfig(EXPERTS, 3, strategy, (), Dropless(tile=4))

    @jax.jit
    def run(x, y_bar):
        with logical_rules():
            layer = MoELayer(config, WIDTH, out_std=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        token_id, mask = jnp.zeros((BATCH, TOKENS), jnp.int32), jnp.ones((BATCH, TOKENS), bool)
        token_id, mask, x, y_bar = jax.sharding.reshard((token_id, mask, x, y_bar), spec("batch"))

        keys = jax.random.split(jax.random.key(0), BATCH)

        def forward(params):
            return nnx.merge(graph, params, rest)(x, token_id, mask, keys)

        y, pullback, statistics = jax.vjp(forward, params, has_aux=True)
        return y, statistics.load, pullback(y_bar)[0], params

    y, load, grads, params = jax.device_get(run(x, y_bar))
    flat = ({"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(s)} for s in (grads, params))
    return y, load, *flat


def test_a_layer_learns_dense_routing_and_sparse_experts(one_device):
    x, y_bar = normal(1, BATCH, TOKENS, WIDTH), normal(2, BATCH, TOKENS, WIDTH)
    y, load, grads, params = run_layer(DenseMixer(K), x, y_bar)
    top_y, top_load, top_grads, top_params = run_layer(TopK(K), x, y_bar)
    np.testing.assert_array_equal(params["router/w"], top_params["router/w"])
    np.testing.assert_allclose(y, top_y, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(load, top_load)
    for name in ("w_gate", "w_up", "w_down"):
        np.testing.assert_allclose(
            grads[f"experts/{name}"], top_grads[f"experts/{name}"], rtol=1e-4, atol=1e-6
        )

    expected = np.zeros((WIDTH, EXPERTS))
    weights = {name: params[f"experts/{name}"] for name in ("w_gate", "w_up", "w_down")}
    for b in range(BATCH):
        token, expert = (a.reshape(-1) for a in np.mgrid[:TOKENS, :EXPERTS])
        everyone = np.ones(len(token))
        _, _, weight_bar, _ = naive.experts(x[b], token, expert, everyone, everyone > 0, weights, y_bar[b])
        logits = x[b].astype(np.float64) @ params["router/w"]
        chosen = naive.choose(logits, None, K, "softmax")
        by_expert = weight_bar.reshape(TOKENS, EXPERTS)
        expected += x[b].T @ dense_gradient(logits, chosen, by_expert, "softmax", True)
    np.testing.assert_allclose(grads["router/w"], expected, rtol=1e-3, atol=1e-5)
    assert np.abs(grads["router/w"] - top_grads["router/w"]).max() > 1e-2


def test_evaluation_is_top_k():
    logits = normal(3, TOKENS, EXPERTS)
    context = Context(jnp.zeros(TOKENS, jnp.int32), jnp.ones(TOKENS, bool))
    routing, top = DenseMixer(K)(logits, None, context), TopK(K)(logits, None, context)
    assert routing.per_token == K
    assert routing.chosen is None
    np.testing.assert_array_equal(routing.expert, top.expert)
    np.testing.assert_array_equal(routing.combine_weight, top.combine_weight)


def test_counts_and_refusals():
    assert DenseMixer(K).experts_per_token(8) == K
    assert DenseMixer(K).trained_experts_per_token(8) == 8
    with pytest.raises(UserError, match="k=9"):
        DenseMixer(9).check(8)
