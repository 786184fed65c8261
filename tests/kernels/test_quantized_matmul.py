"""Products with quantised matrices against float64 ones of what they stand for, on every platform's path."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from other_platform import traced_as

from moe.kernels import Groups, expert_mlp, grouped_matmul, linear, rows_needed
from moe.kernels.quantized_matmul import quantized_matmul, reference
from moe.mesh import spec
from moe.quant import FORMATS, Format, dequantize, quantize

FORMS = {**FORMATS, "int4": Format("int4", 4), "int8 in groups": Format("int8", 4), "w8": Format("fp8")}
TILE, EXPERTS, ASSIGNMENTS, WIDTH, OUT = 4, 3, 16, 12, 5
ROWS = rows_needed(ASSIGNMENTS, EXPERTS, TILE)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive(rows, w):
    """In float64, rows rounded first where the format says so."""
    rows = np.asarray(rows, np.float64)
    if w.format.dynamic:
        scale = np.abs(rows).max(-1, keepdims=True) / w.format.largest
        codes = rows / scale
        codes = (
            np.asarray(jnp.asarray(codes, jnp.float8_e4m3fn), np.float64)
            if w.format.codes == "fp8"
            else np.rint(codes)
        )
        rows = codes * scale
    return rows @ np.asarray(dequantize(w), np.float64)


def close(found, expected, w):
    """To rounding; where rows are rounded, a tie may fall to either side now and then."""
    found, loose = np.asarray(found, np.float64), 0.02 if w.format.dynamic else 0.0
    size = np.sqrt(np.mean(expected**2))
    assert np.mean(np.abs(found - expected)) <= (1e-5 + 0.1 * loose) * size
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=(1e-4 + loose) * size)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("form", FORMS)
def test_one_matrix(platform, form):
    w = quantize(normal(0, 2, WIDTH, OUT), FORMS[form])
    for count in (1, 7):
        rows = normal(1, 2, count, WIDTH)
        with traced_as(platform):
            found = jax.jit(partial(quantized_matmul))(rows, w)
        close(found, naive(rows, w), w)
        close(reference(rows, w), naive(rows, w), w)


def test_bfloat16_rows_are_taken_at_least_as_finely_as_they_are_given():
    """The int8 parts of the CPU's path leave no more error than a product in bfloat16 has."""
    rows, w = normal(1, 8, 256).astype(jnp.bfloat16), quantize(normal(0, 256, 64), FORMATS["int8"])
    exact = naive(rows, w)
    found = quantized_matmul(jnp.asarray(rows), w, preferred_element_type=jnp.float32)
    assert found.dtype == jnp.float32
    assert np.abs(found - exact).max() <= 1e-4 * np.abs(exact).max()
    assert quantized_matmul(jnp.asarray(rows), w).dtype == jnp.bfloat16


@partial(jax.jit, static_argnums=0)
def grouped(platform, rows, w, group_sizes):
    with traced_as(platform):
        return grouped_matmul(rows, w, Groups(group_sizes, TILE))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("form", FORMS)
@given(
    st.lists(st.integers(0, 8), min_size=EXPERTS, max_size=EXPERTS).filter(lambda s: sum(s) <= ASSIGNMENTS),
    st.integers(0, 99),
)
@example([0, 0, 0], 0)
@example([0, 0, ASSIGNMENTS], 0)
@settings(max_examples=6)
def test_a_matrix_for_each_expert(platform, form, group_sizes, seed):
    w = normal(seed, EXPERTS, WIDTH, OUT)
    w[1] /= 100  # a small expert is as exact as the others: `close` compares with its own size below
    w, rows, start = quantize(w, FORMS[form]), normal(seed + 1, ROWS, WIDTH), 0
    found = grouped(platform, rows, w, np.array(group_sizes))
    assert np.isfinite(found).all()
    for expert, size in enumerate(group_sizes):
        if size:
            own = jax.tree.map(lambda leaf, expert=expert: leaf[expert], w)
            close(found[start : start + size], naive(rows[start : start + size], own), own)
        start += -(-size // TILE) * TILE


@pytest.mark.parametrize("form", FORMS)
def test_uniform_groups(form):
    w, rows = quantize(normal(0, EXPERTS, WIDTH, OUT), FORMS[form]), normal(1, EXPERTS * 3, WIDTH)
    found = grouped_matmul(rows, w, Groups(jnp.full(EXPERTS, 3), 3, uniform=True))
    close(found, naive(rows.reshape(EXPERTS, 3, WIDTH), w).reshape(-1, OUT), w)


def test_swiglu_experts_take_quantised_matrices():
    gate, up, down = normal(0, EXPERTS, WIDTH, 8), normal(1, EXPERTS, WIDTH, 8), normal(2, EXPERTS, 8, WIDTH)
    quantised = [quantize(w, FORMATS["int8"]) for w in (gate, up, down)]
    rows, groups = normal(3, ROWS, WIDTH), Groups(jnp.array([5, 0, 9]), TILE)
    found = expert_mlp(rows, *quantised, groups)
    expected = expert_mlp(rows, *map(dequantize, quantised), groups)
    used = np.r_[0:5, 8:17]
    np.testing.assert_allclose(found[used], expected[used], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mesh", ["1x1", "4x2"], indirect=True)
@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4"])
def test_linear_on_a_mesh(mesh, form):
    x, w = normal(0, 8, 5, WIDTH), quantize(normal(1, WIDTH, OUT), FORMS[form])
    y = jax.jit(lambda x, w: linear(jax.sharding.reshard(x, spec("batch")), w))(x, w)
    assert jax.typeof(y).sharding.spec[0] == spec("batch")[0]
    close(y, naive(x, w), w)
