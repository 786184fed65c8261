"""Observed products: results unchanged, and as gradients the second moments of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from other_platform import traced_as

from moe.kernels import Groups, expert_mlp, linear, rows_needed
from moe.kernels.observe import ObservedMatrix, observed_grouped_matmul
from moe.mesh import spec

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("mesh", ["1x1", "4x2"], indirect=True)
def test_a_dense_product(mesh):
    x, w = normal(8, 5, 4), normal(4, 3)

    @jax.jit
    def run(x, w):
        def total(moment, w):
            y = linear(jax.sharding.reshard(x, spec("batch")), ObservedMatrix(w, moment))
            return jax.sharding.reshard(y, spec()).sum(), y

        return jax.grad(total, has_aux=True)(jnp.zeros((4, 4)), w)

    moment, y = run(x, w)
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moment, np.einsum("bsd,bse->de", x, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("uniform", [False, True])
def test_rows_of_each_expert_by_themselves(platform, uniform):
    """What lies in the padding is not observed."""
    tile, sizes = 4, [4, 4, 4] if uniform else [5, 0, 6]
    rows = normal(12 if uniform else rows_needed(16, 3, tile), 6)
    w = normal(3, 6, 2)

    @jax.jit
    def run(rows, w):
        groups = Groups(jnp.array(sizes), tile, uniform=uniform)
        with traced_as(platform):
            y, pullback = jax.vjp(
                lambda m: observed_grouped_matmul(rows, ObservedMatrix(w, m), groups), jnp.zeros((3, 6, 6))
            )
            return pullback(jnp.ones_like(y))[0]

    start, found = 0, run(rows, w)
    for expert, size in enumerate(sizes):
        own = rows[start : start + size]
        np.testing.assert_allclose(found[expert], own.T @ own, rtol=1e-5, atol=1e-5)
        start += -(-size // tile) * tile


def test_experts_observe_what_enters_each_matrix():
    gate, up, down = normal(2, 6, 4), normal(2, 6, 4), normal(2, 4, 6)
    rows, groups = normal(32, 6), Groups(jnp.array([3, 4]), 4)

    @jax.jit
    def run(*moments):
        observed = map(ObservedMatrix, (gate, up, down), moments)
        return expert_mlp(rows, *observed, groups)[np.r_[0:3, 4:8]].sum()

    found = jax.grad(run, argnums=(0, 1, 2))(*(jnp.zeros((2, n, n)) for n in (6, 6, 4)))
    for expert, own in enumerate((rows[0:3], rows[4:8])):
        g, u = own @ gate[expert], own @ up[expert]
        hidden = g / (1 + np.exp(-g)) * u
        for moment, inputs in zip(found, (own, own, hidden), strict=True):
            np.testing.assert_allclose(moment[expert], inputs.T @ inputs, rtol=1e-4, atol=1e-4)
