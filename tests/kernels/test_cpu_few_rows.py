"""Few rows times int8 matrices in C++, against float64, and what happens where they cannot be had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.cpu import few_rows, library
from moe.kernels.quantized_matmul import quantized_matmul
from moe.quant import Format, QuantizedMatrix, dequantize, quantize

pytestmark = pytest.mark.skipif(not library.ready(), reason="there is no C++ compiler")
INT8 = Format("int8")


def matrix(random, *shape: int) -> tuple[QuantizedMatrix, np.ndarray]:
    """Quantised, and what it stands for."""
    w = quantize(jnp.asarray(random.normal(size=shape), jnp.float32), INT8)
    return w, np.asarray(dequantize(w), np.float64)


# Sizes that fill no vector, one piece of work and many, and the four neighbouring outputs not.
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 5, 3), (1, 64, 130), (3, 100, 7), (2, 512, 1001)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product(rows, inputs, outputs, dtype, one_device):
    random = np.random.default_rng(rows)
    w, exact = matrix(random, inputs, outputs)
    x = jnp.asarray(random.normal(size=(rows, inputs)), dtype)
    assert few_rows.fits(w)
    expected = np.asarray(x, np.float64) @ exact
    np.testing.assert_allclose(few_rows.product(x, w), expected, atol=2e-6 * np.abs(expected).max())


def test_experts_of_rows_and_of_none(one_device):
    random, (experts, width, hidden) = np.random.default_rng(0), (6, 33, 50)
    gate, up = (matrix(random, experts, width, hidden) for _ in range(2))
    down = matrix(random, experts, hidden, width)
    expert = np.array([5, 0, 6, 0, -1], np.int32)
    x = random.normal(size=(5, width)).astype(np.float32)
    y = jax.jit(few_rows.swiglu_experts)(x, gate[0], up[0], down[0], expert)
    for row, e, found in zip(x, expert, y, strict=True):
        expected = np.zeros(width)
        if 0 <= e < experts:
            g = row @ gate[1][e]
            expected = (g / (1 + np.exp(-g)) * (row @ up[1][e])) @ down[1][e]
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_other_formats_are_left_to_xla(one_device):
    w = jnp.ones((64, 64))
    for format in (Format("int8", dynamic=True), Format("int8", 32), Format("int4", 32)):
        assert not few_rows.fits(quantize(w, format))
    assert not few_rows.fits(w)


@pytest.mark.parametrize("mesh", ["8x1"], indirect=True)
def test_several_devices_are_left_to_xla(mesh):
    assert not few_rows.fits(quantize(jnp.ones((64, 64)), INT8))


def test_without_a_compiler_products_are_those_of_xla(monkeypatch, capsys, one_device):
    w, exact = matrix(np.random.default_rng(0), 64, 32)
    x = jnp.linspace(-1, 1, 64)[None]
    with monkeypatch.context() as patched:
        patched.setenv("CXX", "/nowhere/c++")
        patched.setenv("XDG_CACHE_HOME", "/nowhere/cache")
        library.ready.cache_clear()
        np.testing.assert_allclose(quantized_matmul(x, w), np.asarray(x) @ exact, rtol=1e-4, atol=1e-4)
        assert "int8 generation is slower" in capsys.readouterr().err
    library.ready.cache_clear()


def test_a_compiler_that_fails_is_named(monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as patched:
        patched.setenv("CXX", "false")
        patched.setenv("XDG_CACHE_HOME", str(tmp_path))
        library.ready.cache_clear()
        assert not library.ready()
        assert "false failed" in capsys.readouterr().err
    library.ready.cache_clear()
