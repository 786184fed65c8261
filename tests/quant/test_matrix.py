"""Quantised matrices against rounding written out in numpy, in float64."""

from functools import partial

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import UserError
from moe.quant import FORMATS, Format, QuantizedMatrix, dequantize, quantize, quantize_rows, split_rows

GROUPED = [Format("int8"), Format("int4", 4), Format("int8", 4), Format("int4"), Format("fp8")]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

weights = arrays.arrays(
    np.float32,
    (2, 12, 3),
    elements=st.floats(-8, 8, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32),
)

jitted = partial(jax.jit, static_argnums=1)


def naive(w, format):
    """Codes [..., D, F] and scales [..., G, F], one output channel and one group at a time."""
    size = format.group_size or w.shape[-2]
    codes, scales = np.zeros(w.shape), np.zeros((*w.shape[:-2], w.shape[-2] // size, w.shape[-1]))
    for *n, g, f in np.ndindex(scales.shape):
        channel = w[(*n, slice(g * size, (g + 1) * size), f)].astype(np.float64)
        scale = max(np.abs(channel).max() / format.largest, np.finfo(np.float32).tiny)
        scale = np.float64(np.asarray(scale, np.float32).astype(np.dtype(format.scale_dtype)))
        near = channel / scale
        near = near.astype(np.float32).astype(E4M3) if format.codes == "fp8" else np.rint(near)
        codes[(*n, slice(g * size, (g + 1) * size), f)] = np.clip(
            near.astype(np.float64), -format.largest, format.largest
        )
        scales[(*n, g, f)] = scale
    return codes, scales


@pytest.mark.parametrize("format", GROUPED, ids=str)
@given(w=weights)
@settings(max_examples=20)
def test_the_error_is_half_a_step_of_the_group_at_most(format, w):
    found = jitted(quantize)(w, format)
    codes, scales = naive(w, format)
    np.testing.assert_allclose(np.asarray(np.swapaxes(found.scales, -1, -2), np.float64), scales, rtol=1e-6)
    size = format.group_size or w.shape[-2]
    wide = np.repeat(np.asarray(np.swapaxes(found.scales, -1, -2), np.float64), size, axis=-2)
    # A quotient that falls on the middle of two codes may go either way.
    step = np.maximum(np.abs(codes) / 8, 2.0**-9) if format.codes == "fp8" else 1.0
    assert np.all(np.abs(np.asarray(np.swapaxes(found.codes(), -1, -2), np.float64) - codes) <= step)
    # Scales in bfloat16 may cut the largest weight by 2^-8 of it.
    cut = 2.0**-8 * format.largest if format.group_size else 1e-4 * format.largest
    assert np.all(np.abs(dequantize(found) - w) <= wide * np.maximum(0.5 * step, cut) * (1 + 1e-5))
    assert found.shape == w.shape


@pytest.mark.parametrize("format", [Format("int4", 4), Format("int4", 12), Format("int4")], ids=str)
def test_two_codes_of_int4_share_a_byte(format):
    w = np.random.default_rng(0).normal(size=(3, 12, 5)).astype(np.float32)
    found = quantize(w, format)
    assert found.values.shape == (3, 5, 6)
    assert found.values.dtype == jnp.uint8
    low, high = np.asarray(found.values) % 16, np.asarray(found.values) // 16
    np.testing.assert_array_equal(found.codes(), np.concatenate([low, high], axis=-1).astype(int) - 8)
    assert np.abs(found.codes()).max() == 7
    assert np.abs(np.asarray(dequantize(found)) - w).max() < np.abs(w).max() / 7


def test_a_small_expert_keeps_its_precision():
    """Weights a hundred times smaller than the others': one scale for all would leave one code or two."""
    w = np.random.default_rng(0).normal(size=(4, 64, 32)).astype(np.float32)
    w[2] /= 100
    error = {name: np.asarray(dequantize(quantize(w, format))) - w for name, format in FORMATS.items()}
    relative = {name: np.linalg.norm(e[2]) / np.linalg.norm(w[2]) for name, e in error.items()}
    assert relative["int8"] <= 0.01
    assert relative["int4"] <= 0.12
    assert relative["fp8"] <= 0.03
    for name, e in error.items():
        ordinary = np.linalg.norm(e[0]) / np.linalg.norm(w[0])
        assert relative[name] == pytest.approx(ordinary, rel=0.1)


def test_stochastic_rounding_is_right_on_average():
    w = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    format = Format("int4")
    step = np.abs(w).max(0) / 7
    noise = jax.random.uniform(jax.random.key(0), (2000, *w.shape))
    many = jax.vmap(lambda noise: dequantize(quantize(w, format, noise=noise)))(noise)
    assert np.abs(many - w).max() <= step.max() * (1 + 1e-5)
    # The mean of 2000 draws between two neighbours strays by half a step / sqrt(2000), rarely four times it.
    assert np.all(np.abs(many.mean(0) - w) <= 4 * step / 2 / 2000**0.5)
    assert (
        np.abs(np.asarray(dequantize(quantize(w, format))) - w).mean() > 5 * np.abs(many.mean(0) - w).mean()
    )


@given(weights)
def test_rows_have_a_scale_each(x):
    for format in (Format("int8", dynamic=True), Format("fp8", dynamic=True)):
        codes, scales = jitted(quantize_rows)(x, format)
        back = np.asarray(codes, np.float64) * np.asarray(scales, np.float64)
        relative = 2.0**-4 if format.codes == "fp8" else 0.0
        assert np.all(np.abs(back - x) <= 0.5001 * np.asarray(scales) + relative * np.abs(x))


@given(weights)
def test_parts_of_rows_add_up(x):
    for parts, relative in ((1, 1 / 254), (2, 1 / 254**2), (3, 2.0**-22)):
        codes, scales = jitted(split_rows)(x, parts)
        back = np.sum(np.asarray(codes, np.float64) * np.asarray(scales, np.float64), axis=-2)
        largest = np.abs(x).max(-1, keepdims=True)
        assert np.all(np.abs(back - x) <= 1.01 * relative * largest + 2e-38)


def test_bytes():
    w = jnp.zeros((4, 64, 32))
    assert quantize(w, FORMATS["int8"]).nbytes == 4 * (64 * 32 + 4 * 32)
    assert quantize(w, FORMATS["int4"]).nbytes == 4 * (64 * 32 // 2 + 2 * 32 * 2)


def test_a_pytree_can_be_cut_and_stacked():
    w = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(np.float32)
    whole = quantize(w, Format("int4", 4))
    second = jax.tree.map(lambda leaf: leaf[1], whole)
    assert isinstance(second, QuantizedMatrix)
    assert second.shape == (3, 8, 4)
    np.testing.assert_array_equal(dequantize(second), dequantize(whole)[1])


@pytest.mark.parametrize(
    ("format", "inputs", "message"),
    [
        (Format("int4", 5), 12, "group_size=5 does not divide the 12 inputs"),
        (Format("int4"), 3, "int4 .* 3 inputs"),
    ],
)
def test_what_does_not_fit_is_refused(format, inputs, message):
    with pytest.raises(UserError, match=message):
        quantize(jnp.zeros((inputs, 2)), format)


@pytest.mark.parametrize("fields", [{"group_size": -1}, {"codes": "int4", "dynamic": True}])
def test_formats_that_do_not_go_together_are_refused(fields):
    with pytest.raises(UserError):
        Format(**fields)
