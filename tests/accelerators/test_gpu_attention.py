"""Attention and the output head on a CUDA GPU: `JAX_PLATFORMS=cuda uv run --extra gpu pytest -n 0 -m gpu`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels import attention, linear_cross_entropy
from moe.mesh import MeshConfig, make_mesh, spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU"),
]


@pytest.fixture(autouse=True)
def one_gpu():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32), spec("batch"))


def relative_error(value, expected) -> float:
    return float(jnp.linalg.norm(value.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


@jax.jit(static_argnums=0)
def with_gradients(f, q, k, v, y_bar):
    y, vjp = jax.vjp(f, q, k, v)
    return y, *vjp(y_bar.astype(y.dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("sequence", "heads", "kv_heads", "width"),
    [(128, 4, 4, 128), (300, 8, 2, 64), (518, 3, 1, 64), (2048, 2, 2, 128)],
)
def test_attention_against_float32(dtype, sequence, heads, kv_heads, width):
    shapes = [(2, sequence, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    exact = [normal(seed, *shape).astype(dtype).astype(jnp.float32) for seed, shape in enumerate(shapes)]
    rounded = [a.astype(dtype) for a in exact]
    assert attention.fits_cudnn(rounded[0])
    assert not attention.fits_cudnn(exact[0])
    with jax.default_matmul_precision("highest"):
        expected = with_gradients(attention.causal_attention, *exact)
    for value, other in zip(with_gradients(attention.causal_attention, *rounded), expected, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, other) < 1e-2


@pytest.mark.parametrize("chunks", [1, 4])
def test_output_head_against_float32(chunks):
    hidden, head = normal(0, 4, 64, 256), jax.sharding.reshard(normal(1, 256, 5000), spec()) / 16
    targets = jax.device_put(np.random.default_rng(2).integers(0, 5000, (4, 64)), spec("batch"))

    def mean(hidden, head):
        return linear_cross_entropy(hidden, head, targets, chunks)[0]

    take = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    rounded = [a.astype(jnp.bfloat16) for a in (hidden, head)]
    with jax.default_matmul_precision("highest"):
        loss, gradients = take(*(a.astype(jnp.float32) for a in rounded))
    close_loss, close_gradients = take(*rounded)
    assert float(close_loss) == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(partial(_assert_close, 1e-2), close_gradients, gradients)


def _assert_close(most, value, expected):
    assert relative_error(value, expected) < most
