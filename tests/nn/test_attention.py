"""Grouped-query attention against query by query in float64, and what rotary positions promise."""

from functools import partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import UserError
from moe.mesh import logical_rules
from moe.nn import AttentionConfig
from moe.nn.attention import Attention, rotate

WIDTH, SEQUENCE, EPSILON = 12, 9, 1e-3

CONFIGS = [
    AttentionConfig(heads=4, kv_heads=4, head_width=6),
    AttentionConfig(heads=4, kv_heads=2, head_width=6, qk_norm="head", rope_theta=50.0),
    AttentionConfig(heads=4, kv_heads=1, head_width=4, qk_norm="full"),
    AttentionConfig(heads=6, kv_heads=3, head_width=2, bias=True),
    AttentionConfig(heads=2, kv_heads=2, head_width=8, rotary_fraction=0.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_against_query_by_query(one_device, config):
    shape = {"out_std": 1.0, "epsilon": EPSILON, "dtype": jnp.dtype("float32")}
    with logical_rules():
        attention = jax.eval_shape(lambda: Attention(config, WIDTH, **shape, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(attention)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
    x = np.random.default_rng(2).normal(size=(2, SEQUENCE, WIDTH)).astype(np.float32)
    y = jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, x)

    named = {path[0]: p[...].astype(np.float64) for path, p in nnx.to_flat_state(params)}
    rule = {"heads": config.heads, "kv_heads": config.kv_heads, "head_width": config.head_width}
    rule |= {"qk_norm": config.qk_norm, "theta": config.rope_theta, "epsilon": EPSILON}
    rule |= {"rotary_width": config.rotary_width}
    expected = [naive.attention(sequence.astype(np.float64), named, **rule) for sequence in x]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@partial(jax.jit, static_argnames="theta")
def turned(x, position, theta):
    return rotate(x[None, None, None], jnp.asarray(position)[None], theta, x.shape[-1])[0, 0, 0]


@given(
    seed=st.integers(0, 2**16),
    theta=st.sampled_from([100.0, 10_000.0]),
    first=st.integers(0, 500),
    second=st.integers(0, 500),
    shift=st.integers(0, 500),
)
def test_only_the_distance_of_two_positions_matters(one_device, seed, theta, first, second, shift):
    q, k = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    here = turned(q, first, theta) @ turned(k, second, theta)
    there = turned(q, first + shift, theta) @ turned(k, second + shift, theta)
    np.testing.assert_allclose(here, there, atol=2e-3)
    np.testing.assert_allclose(jnp.linalg.norm(turned(q, first, theta)), np.linalg.norm(q), rtol=1e-5)


def test_distances_do_matter(one_device):
    q = np.ones(8, np.float32)
    products = [float(turned(q, 0, 100.0) @ turned(q, p, 100.0)) for p in range(4)]
    assert products == sorted(products, reverse=True)
    assert products[0] - products[3] > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"head_width": 5}, "head_width=5"),
        ({"head_width": 6, "rotary_fraction": 0.5}, "rotary_fraction=0.5 of it is 3"),
        ({"rotary_fraction": 1.5}, "rotary_fraction=1.5"),
    ],
)
def test_bad_shapes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        AttentionConfig(**fields)
