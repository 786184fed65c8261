"""Fake quantisation: the values of the real one, and the gradients of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.quant import FORMATS, Format, dequantize, fake_quantize, quantize

W = np.random.default_rng(0).normal(size=(3, 16, 5)).astype(np.float32)


@pytest.mark.parametrize("format", [*FORMATS.values(), Format("int4", 4)], ids=str)
def test_the_value_is_that_of_real_quantisation(format):
    if format.group_size == 32:
        format = Format("int4", 8)
    np.testing.assert_allclose(
        fake_quantize(W, format), dequantize(quantize(W, format)), rtol=1e-6, atol=1e-7
    )
    ones = jnp.ones((3, format.groups(16), 5))
    clipped = fake_quantize(W, format, clip=ones)
    np.testing.assert_allclose(clipped, dequantize(quantize(W, format)), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_straight_through():
    w_bar = np.random.default_rng(1).normal(size=W.shape).astype(np.float32)
    for noise in (None, jax.random.uniform(jax.random.key(0), W.shape)):
        _, pullback = jax.vjp(lambda w, noise=noise: fake_quantize(w, Format("int4", 4), noise=noise), W)
        np.testing.assert_array_equal(pullback(w_bar)[0], w_bar)


def test_learned_clipping_has_the_gradients_of_lsq():
    """1902.08153: weights in the range pass (eq. 5); scales get round(v) - v there, +-Q beyond (eq. 3)."""
    format, clip = Format("int4"), np.full((3, 1, 5), 0.6, np.float32)
    w_bar = np.random.default_rng(1).normal(size=W.shape).astype(np.float32)
    value, pullback = jax.vjp(lambda w, clip: fake_quantize(w, format, clip=clip), W, clip)
    to_w, to_clip = pullback(w_bar)

    largest = np.abs(W).max(1, keepdims=True) / 7
    v = W.astype(np.float64) / (0.6 * largest)
    inside = np.abs(v) < 7
    assert 0.02 < 1 - inside.mean() < 0.4, "the case has weights on both sides"
    np.testing.assert_allclose(value, np.clip(np.rint(v), -7, 7) * 0.6 * largest, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_w, w_bar * inside, rtol=1e-5)
    to_scale = np.where(inside, np.rint(v) - v, np.sign(v) * 7)
    expected = (w_bar * to_scale * largest).sum(1, keepdims=True) / np.sqrt(16 * 7)
    np.testing.assert_allclose(to_clip, expected, rtol=1e-4, atol=1e-5)


def test_clipping_is_learned_to_lower_the_error():
    """Heavy tails: to leave some weights out of the range makes all others finer."""
    w = np.random.default_rng(2).standard_t(3, size=(256, 8)).astype(np.float32)

    @jax.jit
    def step(clip):
        def error(clip):
            return jnp.sum((fake_quantize(w, Format("int4"), clip=clip) - w) ** 2)

        value, gradient = jax.value_and_grad(error)(clip)
        return clip - 0.01 * jnp.sign(gradient), value

    clip, first = step(jnp.ones((1, 8)))
    for _ in range(40):
        clip, last = step(clip)
    assert last < 0.8 * first
    assert np.all(clip < 0.95)
