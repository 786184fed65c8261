"""The router's product, whole and split into parts, against float64, on one device and on eight."""

from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.mesh import spec

module = import_module("moe.kernels.linear_float32")


def relative_error(x, reference) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64) - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("mesh", ["1x1", "4x2"], indirect=True)
@pytest.mark.parametrize("product", [module.linear_float32, module._by_parts], ids=["whole", "by parts"])
def test_value_and_gradients(mesh, product):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(8, 50, 96)), jnp.bfloat16)
    w, y_bar = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((96, 7), (8, 50, 7)))

    @jax.jit
    def run(x, w, y_bar):
        y, pullback = jax.vjp(product, jax.sharding.reshard(x, spec("batch")), w)
        return y, *pullback(jax.sharding.reshard(y_bar, spec("batch")))

    y, x_bar, w_bar = run(x, w, y_bar)
    assert (y.dtype, x_bar.dtype, w_bar.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    x64, w64, y_bar64 = (np.asarray(a, np.float64) for a in (x, w, y_bar))
    assert relative_error(y, x64 @ w64) < 1e-6
    assert relative_error(w_bar, np.einsum("gtd,gte->de", x64, y_bar64)) < 1e-6
    exact = jnp.asarray(y_bar64 @ w64.T, jnp.bfloat16)  # but for numbers near the middle of two of bf16
    assert relative_error(x_bar, np.asarray(exact, np.float64)) < 5e-4


def test_parts_add_up_to_the_last_bit():
    a = jnp.asarray(
        np.random.default_rng(1).normal(size=1000) * 10.0 ** np.arange(-5, 5).repeat(100), jnp.float32
    )
    parts = jax.jit(module._parts)(a)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    np.testing.assert_array_equal(
        sum(np.asarray(part, np.float64) for part in parts), np.asarray(a, np.float64)
    )
