"""The Hopper kernels on a machine without a GPU: they lower, fit into shared memory and under our mesh."""

import hopper_reference
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe.dispatch import AllToAll, Dropless, Gather
from moe.kernels import Groups, hopper, rows_needed
from moe.kernels.hopper import target
from moe.mesh import logical_rules, spec
from moe.nn import MoEConfig, MoELayer
from moe.routing import ExpertChoice, TopK

EXPERTS, TOKENS, ASSIGNMENTS = 4, 96, 256

CALLS = {
    "product": ("product", ("rows D", "E D F"), {}),
    "product, gathered": ("product", ("tokens D", "E D F"), {"token": ...}),
    "product, transposed": ("product", ("rows F", "E D F"), {"transposed": True}),
    "inward_transposed": ("inward_transposed", ("rows 2F", "E D F", "E D F"), {}),
    "swiglu_product": ("swiglu_product", ("rows D", "E D F", "E D F"), {}),
    "swiglu_product, gathered": (
        "swiglu_product",
        ("tokens D", "E D F", "E D F"),
        {"token": ..., "keep": False},
    ),
    "swiglu_backward": ("swiglu_backward", ("rows D", "E F D", "rows 2F", "rows"), {}),
    "swiglu_backward, gathered": (
        "swiglu_backward",
        ("tokens D", "E F D", "rows 2F", "rows"),
        {"token": ...},
    ),
    "weight_gradient": ("weight_gradient", ("rows D", "rows F"), {}),
    "weight_gradient, gathered": (
        "weight_gradient",
        ("tokens D", "rows 2F"),
        {"matrices": 2, "x_token": ...},
    ),
    "weight_gradient, gathered columns": ("weight_gradient", ("rows F", "tokens D"), {"y_token": ...}),
}


def traced(call, width, hidden, tile, dtype):
    """A kernel and its reference on the same abstract arguments."""
    name, arrays, options = CALLS[call]
    rows = rows_needed(ASSIGNMENTS, EXPERTS, tile)
    sizes = {"E": EXPERTS, "D": width, "F": hidden, "2F": 2 * hidden, "rows": rows, "tokens": TOKENS}
    shapes = [tuple(sizes[axis] for axis in array.split()) for array in arrays]
    arguments = [jax.ShapeDtypeStruct(s, dtype if len(s) > 1 else jnp.float32) for s in shapes]

    def of(module):
        def run(group_sizes, token, *arguments):
            given = {name: token if value is ... else value for name, value in options.items()}
            return getattr(module, name)(*arguments, Groups(group_sizes, tile), **given)

        integers = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (EXPERTS, rows)]
        return jax.jit(run).trace(*integers, *arguments)

    return of(hopper), of(hopper_reference)


@pytest.mark.parametrize(
    ("width", "hidden", "tile", "dtype"),
    [
        (512, 256, 128, jnp.bfloat16),
        (640, 384, 128, jnp.float16),
        (640, 384, 64, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_kernels_lower_for_cuda_and_give_the_shapes_of_their_reference(call, width, hidden, tile, dtype):
    """Lowering finds what does not fit: layouts, registers that overlap, shared memory beyond 227 KB."""
    kernel, reference = traced(call, width, hidden, tile, dtype)
    given, expected = (jax.tree.leaves(t.out_info) for t in (kernel, reference))
    assert [a.shape for a in given] == [a.shape for a in expected]
    assert all(a.dtype == (dtype if a.ndim > 1 else jnp.float32) for a in given)
    assert "mosaic_gpu" in kernel.lower(lowering_platforms=("cuda",)).as_text()


WIDTH, HIDDEN, SEQUENCE, BATCH = 384, 128, 16, 16
LAYERS = {
    "top-k": MoEConfig(8, HIDDEN, TopK(k=2), dispatch=Dropless(tile=128)),
    "chunks": MoEConfig(8, HIDDEN, TopK(k=2), dispatch=Dropless(tile=64, exchange=Gather(), chunks=2)),
    "all to all": MoEConfig(8, HIDDEN, TopK(k=2), dispatch=Dropless(exchange=AllToAll(64.0), chunks=2)),
    "expert choice": MoEConfig(8, HIDDEN, ExpertChoice(), dispatch=Dropless(tile=128)),
}


def traced_layer(config):
    """A layer's output, and the gradients of its parameters and tokens; each must lie as what it is of."""

    def build():
        return MoELayer(config, WIDTH, out_std=1.0, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))

    with logical_rules():
        graph, params, rest = nnx.split(jax.eval_shape(jax.jit(build)), nnx.Param, ...)

    def run(params, rest, x):
        x, ids, mask = (
            jax.sharding.reshard(a, spec("batch"))
            for a in (x, jnp.ones(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2], bool))
        )
        y, pullback = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x, ids, mask)[0], params, x)
        gradients = pullback(y)
        assert jax.typeof(y) == jax.typeof(x)
        assert jax.tree.map(jax.typeof, gradients) == jax.tree.map(jax.typeof, (params, x))
        return y, gradients

    return jax.jit(run).trace(params, rest, jax.ShapeDtypeStruct((BATCH, SEQUENCE, WIDTH), jnp.bfloat16))


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(target, "present", lambda: True)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("top-k", "1x1"), ("chunks", "2x4"), ("all to all", "2x4"), ("expert choice", "8x1")],
    indirect=["mesh"],
)
def test_a_layer_and_its_gradients_lower_on_a_mesh(mesh, on_hopper, name):
    """Six kernels for each chunk: two forward, four backward."""
    lowered = traced_layer(LAYERS[name]).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu_v2(") == 6 * LAYERS[name].dispatch.chunks
