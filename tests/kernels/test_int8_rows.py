"""Experts of int8 over int8 rows: where Hopper's kernels are chosen, that they lower, what is around them."""

from importlib import import_module

import hopper_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from other_platform import traced_for
from routed import plan_of

from moe.kernels import expert_mlp, grouped_matmul, hopper, routed_mlp
from moe.kernels.permute import sum_by_token
from moe.kernels.round_rows import in_one_pass, reference
from moe.quant import Format, QuantizedMatrix, dequantize, format_named, quantize

EXPERTS, PER_TOKEN, TOKENS, TILE, H100 = 3, 2, 24, 4, "NVIDIA H100 80GB HBM3"
DYNAMIC = format_named("int8-dynamic")


def layer(width, hidden, tile, format, dtype):
    """Arguments of `routed_mlp`, random."""
    random = np.random.default_rng(0)
    expert = random.integers(-1, EXPERTS, (TOKENS, PER_TOKEN)).reshape(-1)
    token = np.repeat(np.arange(TOKENS), PER_TOKEN)
    plan = plan_of(token, expert, experts=EXPERTS, tile=tile, per_token=PER_TOKEN)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    weights = [random.normal(size=(EXPERTS, *s)).astype(np.float32) / s[0] ** 0.5 for s in shapes]
    weights = [quantize(jnp.asarray(w), format) for w in weights]
    x = jnp.asarray(random.normal(size=(TOKENS, width)), dtype)
    return x, *weights, jnp.asarray(random.random(len(token)), jnp.float32), plan


def kernels(function, *arguments):
    """Names of the kernels that it calls on an H100, and how many there are in what is lowered."""
    with traced_for(H100):
        traced = jax.jit(function).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = ("int8_swiglu", "int8_product", "round_rows", "grouped_product")
    return {name for name in names if f"name={name}" in str(traced.jaxpr)}, lowered.count("@mosaic_gpu_v2(")


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("width", "hidden"), [(256, 384), (384, 128)])
def test_on_hopper_experts_of_int8_take_rows_of_int8(width, hidden, tile):
    x, *weights, combine, plan = layer(width, hidden, tile, DYNAMIC, jnp.bfloat16)
    both = {"int8_swiglu", "int8_product", "round_rows"}, 2
    assert kernels(routed_mlp, x, *weights, combine, plan) == both
    rows = jnp.zeros((plan.assignment.shape[0], width), x.dtype)
    assert kernels(expert_mlp, rows, *weights, plan.groups) == both
    assert kernels(grouped_matmul, rows, weights[0], plan.groups) == ({"int8_product", "round_rows"}, 1)


@pytest.mark.parametrize(
    ("width", "tile", "format", "dtype"),
    [
        (256, 128, Format(), jnp.bfloat16),
        (256, 128, format_named("fp8"), jnp.bfloat16),
        (256, 128, DYNAMIC, jnp.float32),
        (192, 128, DYNAMIC, jnp.bfloat16),
        (256, 32, DYNAMIC, jnp.bfloat16),
    ],
)
def test_others_do_not(width, tile, format, dtype):
    with traced_for(H100):
        text = str(jax.jit(routed_mlp).trace(*layer(width, 128, tile, format, dtype)).jaxpr)
    assert "name=int8" not in text


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_of_them(whole, wide, monkeypatch):
    """Around the kernels, which are replaced by what they compute, against float64."""
    module = import_module("moe.kernels.int8_rows")

    def unquantised(_, *arrays):
        return not any(isinstance(a, QuantizedMatrix) for a in arrays)

    monkeypatch.setattr(hopper, "fits", unquantised)
    monkeypatch.setattr(module, "WIDE", 1 if wide else 100)
    for name in ("int8_swiglu", "int8_product"):
        monkeypatch.setattr(hopper, name, getattr(hopper_reference, name))
    x, *weights, combine, plan = jax.tree.map(jnp.asarray, layer(20, 12, TILE, DYNAMIC, jnp.float32))
    if whole:
        found = jax.jit(lambda *a: routed_mlp(*a))(x, *weights, combine, plan)
    else:
        rows = x.at[plan.row_token(padding=0)].get()
        rows = jax.jit(lambda *a: expert_mlp(*a))(rows, *weights, plan.groups)
        found = sum_by_token(rows, plan, TOKENS, combine)
    gate, up, down = (np.asarray(dequantize(w), np.float64) for w in weights)
    tile_expert = np.asarray(plan.groups.tile_experts(len(plan.assignment) // TILE))
    expected = np.zeros(found.shape)
    for token, row, weight in zip(plan.token, plan.row, np.asarray(combine), strict=True):
        if row < len(plan.assignment):
            mine, e = np.asarray(x[token], np.float64), tile_expert[row // TILE]
            inner = mine @ gate[e]
            expected[token] += weight * ((inner / (1 + np.exp(-inner)) * (mine @ up[e])) @ down[e])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.02  # of the rounding of rows, and no more


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (33, 100), (5, 5000)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_rounded_in_one_pass(rows, width, dtype):
    x = np.random.default_rng(0).normal(size=(rows, width)) * np.arange(rows)[:, None]  # the first is zeros
    codes, scales = in_one_pass(jnp.asarray(x, dtype), interpret=True)
    expected_codes, expected_scales = reference(jnp.asarray(x, dtype))
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    assert np.mean(np.asarray(codes) != np.asarray(expected_codes)) < 1e-3  # a tie goes up, not to even
    assert np.abs(np.asarray(codes, int) - np.asarray(expected_codes, int)).max() <= 1


def test_unused_rows_cost_nothing():
    """What no program has written stays as it was: NaN where kernels are interpreted."""
    x = jnp.ones((40, 2048))
    _, scales = in_one_pass(x, jnp.int32(6), interpret=True)
    assert not np.isnan(scales[:6]).any()
    assert np.isnan(scales[8:]).all()
