"""Router logits from bfloat16 tokens, by one product or by three parts, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_platform import traced_as

from moe.kernels.precise_linear import precise_linear
from moe.mesh import spec

GROUPS, TOKENS, WIDTH, EXPERTS = 8, 6, 32, 5


@jax.jit(static_argnames="platform")
def product_and_gradients(x, w, y_bar, platform):
    with traced_as(platform):
        y, vjp = jax.vjp(precise_linear, x, w)
        return y, *vjp(y_bar)


def distance(value, expected):
    return np.abs(np.asarray(value, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("mesh", ["1x1", "2x4"], indirect=True)
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(max_examples=8)
def test_against_float64(mesh, platform, seed, scale):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(GROUPS, TOKENS, WIDTH)), jnp.bfloat16)
    w = (scale * random.normal(size=(WIDTH, EXPERTS))).astype(np.float32)
    y_bar = random.normal(size=(GROUPS, TOKENS, EXPERTS)).astype(np.float32)
    split = [jax.device_put(a, spec("batch")) for a in (x, y_bar)]
    y, x_bar, w_bar = product_and_gradients(split[0], w, split[1], platform)

    exact = np.asarray(x, np.float64)
    assert distance(y, exact @ w.astype(np.float64)) < 1e-6  # a product in bfloat16 is 4e-3 off
    assert distance(w_bar, np.einsum("gtd,gte->de", exact, y_bar.astype(np.float64))) < 1e-6
    assert distance(x_bar, y_bar.astype(np.float64) @ w.T.astype(np.float64)) < 2**-8
    assert (y.dtype, x_bar.dtype, w_bar.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_float32_tokens_lose_nothing(one_device, platform):
    random = np.random.default_rng(0)
    x = random.normal(size=(GROUPS, TOKENS, WIDTH)).astype(np.float32)
    w = random.normal(size=(WIDTH, EXPERTS)).astype(np.float32)
    y, *_ = product_and_gradients(x, w, np.ones((GROUPS, TOKENS, EXPERTS), np.float32), platform)
    assert distance(y, x.astype(np.float64) @ w) < 1e-6
