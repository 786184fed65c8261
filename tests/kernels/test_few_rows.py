"""The Hopper kernels for few rows, without a GPU: they lower, alone and in the layer of a decode step."""

from importlib import import_module

import jax
import jax.numpy as jnp
import pytest

from moe.dispatch.touched import Touched
from moe.kernels import Groups, hopper, rows_needed
from moe.kernels.hopper.few_rows import TILES
from moe.mesh import spec
from moe.nn.feed_forward import SWIGLU_EXPERTS
from moe.quant.format import Format
from moe.quant.matrix import quantize
from moe.routing import Routing

EXPERTS, WIDTH, HIDDEN = 16, 256, 384


def matrices(dtype):
    """Gate, up and down; int8 ones lie columns first and have scales."""
    shapes = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    if dtype != jnp.int8:
        return [jax.ShapeDtypeStruct(s, dtype) for s in shapes], [None] * 3
    columns_first = [jax.ShapeDtypeStruct((e, f, d), dtype) for e, d, f in shapes]
    return columns_first, [jax.ShapeDtypeStruct((e, f), jnp.float32) for e, _, f in shapes]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_kernels_lower_for_cuda(tile, dtype):
    """Lowering finds what does not fit: layouts, shared memory beyond what a program may have."""
    x_dtype = jnp.bfloat16 if dtype == jnp.int8 else dtype
    rows = rows_needed(40, EXPERTS, tile)

    def run(x, matrices, scales, sizes):
        (gate, up, down), (gate_scale, up_scale, down_scale) = matrices, scales
        groups = Groups(sizes, tile)
        hidden = hopper.few_rows_swiglu(x, gate, up, groups, scales=(gate_scale, up_scale))
        return hopper.few_rows_product(hidden, down, groups, scale=down_scale)

    x = jax.ShapeDtypeStruct((rows, WIDTH), x_dtype)
    traced = jax.jit(run).trace(x, *matrices(dtype), jax.ShapeDtypeStruct((EXPERTS,), jnp.int32))
    assert (traced.out_info.shape, traced.out_info.dtype) == ((rows, WIDTH), x_dtype)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2(") == 2


def test_rows_of_a_tile():
    tiles = [hopper.few_rows_tile(assignments, 128) for assignments in (1, 8, 512, 513, 4096, 4097)]
    assert tiles == [8, 8, 8, 16, 64, None]


@pytest.mark.parametrize("mesh", ["1x1", "2x4"], indirect=True)
@pytest.mark.parametrize(
    ("format", "tokens", "kernel"),
    [
        (None, 1, "few_rows_swiglu"),
        (None, 512, "swiglu_product"),
        (Format(), 1, "few_rows_swiglu"),
        (Format(), 512, "grouped_product"),
        (Format("int4", 128), 1, "grouped_product"),
        (Format("int4", 128), 512, "grouped_product"),
    ],
)
def test_what_a_decode_step_takes(mesh, format, tokens, kernel, monkeypatch):
    monkeypatch.setattr("moe.kernels.hopper.target.present", lambda: True)
    monkeypatch.setattr("moe.kernels.hopper.few_rows.present", lambda: True)
    monkeypatch.setattr(import_module("moe.kernels.touched_mlp"), "platform", lambda: "gpu")

    def run(x, token, expert, weight, weights):
        x, token, expert, weight = jax.sharding.reshard((x, token, expert, weight), spec("batch"))
        weights = jax.sharding.reshard(weights, spec("expert"))
        routing = Routing(token, expert, weight, None, 1)
        return Touched()(x, routing, weights, SWIGLU_EXPERTS, num_experts=EXPERTS, keep_outputs=False)[0]

    weights = dict(zip(("w_gate", "w_up", "w_down"), matrices(jnp.bfloat16)[0], strict=True))
    if format is not None:
        weights = jax.eval_shape(
            lambda weights: {k: quantize(w, format) for k, w in weights.items()}, weights
        )
    integers = jax.ShapeDtypeStruct((8, tokens), jnp.int32)
    x = jax.ShapeDtypeStruct((8, tokens, WIDTH), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((8, tokens), jnp.float32)
    text = str(jax.jit(run).trace(x, integers, integers, weight, weights).jaxpr)
    names = ("few_rows_swiglu", "swiglu_product", "grouped_product")  # the last ends what the second began
    assert next(name for name in names if f"name={name}" in text) == kernel
