"""GPTQ against the least-squares problem that it solves, one input at a time, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.compress.gptq import DAMPING, best_scales, gptq
from moe.quant import Format, dequantize, find_scales, quantize, round_to

INPUTS, OUTPUTS = 16, 6
jitted = jax.jit(gptq, static_argnums=2)


def case(seed, rows=200):
    """Weights, and the moments of inputs that go together, so that one can stand in for another."""
    random = np.random.default_rng(seed)
    w = random.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    x = random.normal(size=(rows, 5)) @ random.normal(size=(5, INPUTS))
    x += 0.1 * random.normal(size=(rows, INPUTS))
    return w, (x.T @ x).astype(np.float32)


def naive(w, moment, scales, format):
    """After each input is rounded, those to come are set to their optimum given all errors made so far."""
    damped = moment + DAMPING * np.trace(moment) / INPUTS * np.eye(INPUTS)
    target, w, codes = w.astype(np.float64), w.astype(np.float64), np.zeros(w.shape)
    wide = np.repeat(np.asarray(scales, np.float64), INPUTS // len(scales), axis=0)
    for d in range(INPUTS):
        codes[d] = np.clip(np.rint(w[d] / wide[d]), -format.largest, format.largest)
        done, rest = slice(0, d + 1), slice(d + 1, None)
        off = codes[done] * wide[done] - target[done]
        w[rest] = target[rest] - np.linalg.solve(damped[rest, rest], damped[rest, done] @ off)
    return codes


def output_error(w, codes, scales, moment):
    wide = np.repeat(np.asarray(scales, np.float64), INPUTS // len(scales), axis=0)
    off = np.asarray(codes, np.float64) * wide - w
    return np.einsum("df,de,ef->", off, moment, off)


@pytest.mark.parametrize("format", [Format("int4", 8), Format("int4"), Format("int8")], ids=str)
def test_every_input_makes_up_for_those_before(format):
    found, nearest = [], []
    for seed in range(6):
        w, moment = case(seed)
        codes, scales = jitted(w, moment, format)
        expected = naive(w, moment.astype(np.float64), scales, format)
        # A quotient near the middle of two codes may go the other way in float32, and then all that follow.
        assert np.mean(np.asarray(codes) != expected) < 0.05
        plain = find_scales(w, format)
        nearest.append(output_error(w, round_to(w, plain, format), plain, moment))
        found.append(output_error(w, codes, scales, moment))
    assert np.mean(np.log(found)) < np.mean(np.log(nearest)) - 0.2


def test_layers_and_experts_by_themselves():
    cases = [[case(2 * layer + expert) for expert in range(2)] for layer in range(2)]
    w, moment = (np.array([[pair[i] for pair in layer] for layer in cases]) for i in (0, 1))
    codes, scales = jitted(w, moment, Format("int4", 4))
    assert codes.shape == w.shape
    one, one_scales = jitted(w[1, 0], moment[1, 0], Format("int4", 4))
    assert np.mean(np.asarray(codes[1, 0]) != np.asarray(one)) < 0.05
    np.testing.assert_array_equal(scales[1, 0], one_scales)


def test_without_any_inputs_it_rounds_to_the_nearest():
    """An expert that nothing ever reached."""
    w, _ = case(0)
    codes, scales = jitted(w, jnp.zeros((INPUTS, INPUTS)), Format("int4", 4))
    np.testing.assert_array_equal(codes, round_to(w, scales, Format("int4", 4)))
    assert np.abs(np.asarray(codes)).max() == 7


def test_scales_are_chosen_for_the_inputs_that_matter():
    """Where the largest weight meets an input that is never used, the others get the finer range."""
    w = (0.5 + np.random.default_rng(0).normal(size=(8, 1)) / 10).astype(np.float32)
    w[3] = 0.9
    importance = np.ones(8, np.float32)
    importance[3] = 0.0
    fine, even = (best_scales(w, each, Format("int4")) for each in (importance, np.ones(8, np.float32)))
    assert fine < even
    assert even <= find_scales(w, Format("int4"))


def test_clipping_never_makes_the_error_larger():
    w, format = np.random.default_rng(0).standard_t(3, size=(32, 8)).astype(np.float32), Format("int4", 16)
    scales = best_scales(w, np.ones(32, np.float32), format)
    wide = np.repeat(np.asarray(scales, np.float32), 16, axis=0)
    clipped = (np.asarray(round_to(w, scales, format)) * wide - w) ** 2
    plain = (np.asarray(dequantize(quantize(w, format))) - w) ** 2
    groups = (2, 16, 8)
    assert np.all(clipped.reshape(groups).sum(1) <= plain.reshape(groups).sum(1) * (1 + 1e-5))
    assert clipped.sum() < plain.sum()
