"""Rows by themselves with the matrix of their expert: interpreted, against float64; and that they lower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from other_platform import traced_for

from moe.dispatch.plan import by_expert
from moe.kernels.touched_mlp import MOST_VECTORS, SELDOM_TWICE, tile_for, touched_mlp
from moe.kernels.vector_triton import Cut, vector_product, vector_swiglu, vectors_fit
from moe.quant import Format, dequantize, quantize

EXPERTS, WIDTH, HIDDEN, TOKENS, H100 = 8, 512, 256, 2, "NVIDIA H100 80GB HBM3"
FORMATS = {"int8": Format(), "dynamic": Format(dynamic=True), "int4": Format("int4", 32)}


def matrices(format):
    random = np.random.default_rng(0)
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return [quantize(jnp.asarray(random.normal(size=(EXPERTS, *s)) / s[0] ** 0.5), format) for s in shapes]


@pytest.mark.parametrize("cut", [Cut(), Cut(columns=16, depth=128, together=4)])
@pytest.mark.parametrize("format", FORMATS)
def test_every_assignment(format, cut):
    gate, up, down = matrices(FORMATS[format])
    x = np.random.default_rng(1).normal(size=(TOKENS, WIDTH)).astype(np.float32)
    token, expert = np.array([0, 0, 1, 1, 1], np.int32), np.array([2, 0, 2, EXPERTS, -1], np.int32)

    @jax.jit
    def run(x, gate, up, down):
        hidden = vector_swiglu(x, gate, up, token, expert, cut=cut, interpret=True)
        return vector_product(hidden, down, expert, cut=cut, interpret=True)

    found = run(x, gate, up, down)
    wide = [np.asarray(dequantize(w), np.float64) for w in (gate, up, down)]
    for y, t, e in zip(found, token, expert, strict=True):
        expected = np.zeros(WIDTH)
        if 0 <= e < EXPERTS:
            inner = x[t] @ wide[0][e]
            expected = (inner / (1 + np.exp(-inner)) * (x[t] @ wide[1][e])) @ wide[2][e]
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_they_lower(format, dtype):
    def run(x, gate, up, down, token, expert):
        return vector_product(vector_swiglu(x, gate, up, token, expert), down, expert)

    x, integers = jax.ShapeDtypeStruct((TOKENS, WIDTH), dtype), jax.ShapeDtypeStruct((4,), jnp.int32)
    with traced_for(H100):
        traced = jax.jit(run).trace(x, *matrices(FORMATS[format]), integers, integers)
        assert (traced.out_info.shape, traced.out_info.dtype) == ((4, WIDTH), dtype)
        traced.lower(lowering_platforms=("cuda",))


def test_what_they_take():
    def fit(format, columns=256, inputs=256, experts=1):
        shape = jax.ShapeDtypeStruct((experts, inputs, columns), jnp.float32)
        w = jax.eval_shape(lambda w: quantize(w, format), shape)
        with traced_for(H100):
            return vectors_fit(jnp.zeros((1, inputs), jnp.bfloat16), w)

    assert all(fit(format) for format in FORMATS.values())
    assert not fit(Format("fp8", dynamic=True))
    assert not fit(Format("int8", 32))
    assert not fit(Format(), columns=200)
    assert not fit(Format(), inputs=192)
    # Places between 2**31 and 2**32 bytes would be counted with a sign.
    assert [fit(Format(), 2048, 7168, experts) for experts in (128, 256, 512)] == [True, False, True]


@pytest.mark.parametrize(
    ("format", "card", "assignments", "by_vectors"),
    [
        ("int8", H100, EXPERTS // SELDOM_TWICE, True),
        ("dynamic", H100, EXPERTS // SELDOM_TWICE, True),
        ("int8", H100, EXPERTS // SELDOM_TWICE + 1, False),
        ("int8", "NVIDIA A100-SXM4-80GB", MOST_VECTORS, True),
        ("int4", H100, MOST_VECTORS, True),
        ("int4", H100, MOST_VECTORS + 1, False),
    ],
)
def test_when_assignments_are_multiplied_by_themselves(format, card, assignments, by_vectors):
    """On Hopper int8 has kernels for a few rows of an expert, so only where it hardly ever has two."""
    x = jnp.zeros((assignments, WIDTH), jnp.bfloat16)
    expert, given = jnp.zeros(assignments, jnp.int32), matrices(FORMATS[format])
    with traced_for(card):
        tile = tile_for(assignments, EXPERTS, x, *given) or 128

        def run(x, expert, *matrices):
            plan = by_expert(expert, jnp.arange(assignments), EXPERTS, tile, 1)
            return touched_mlp(x, *matrices, expert, plan)

        text = str(jax.jit(run).trace(x, expert, *given).jaxpr)
    assert ("vector_swiglu" in text) == by_vectors
