"""A whole layer over quantised experts on a Hopper GPU, against the same layer over what they stand for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.dispatch import Dropless
from moe.dispatch.touched import Touched
from moe.kernels.hopper.target import present
from moe.mesh import MeshConfig, logical_rules, make_mesh, spec
from moe.nn import MoEConfig, MoELayer
from moe.nn.quantized import quantize_model
from moe.quant import QuantizedMatrix, dequantize, format_named
from moe.routing import TopK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not present(), reason="no Hopper GPU")]

WIDTH, HIDDEN = 512, 384
# Relative to the norm of the output: bfloat16 throughout, and rows rounded to int8 where the format says so.
TOLERANCE = {"int8": 8e-3, "int4": 8e-3, "int8-dynamic": 3e-2}


def layer(dispatch, dtype):
    """The same parameters, whatever is asked for."""
    config = MoEConfig(num_experts=32, expert_width=HIDDEN, routing=TopK(4), dispatch=dispatch)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), logical_rules():
        return MoELayer(config, WIDTH, out_std=1.0, dtype=dtype, rngs=nnx.Rngs(0))


def stood_for(model):
    """The same layer with plain matrices, equal to what the quantised ones stand for."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def plain(_, variable):
        value = variable.get_value()
        wide = dequantize(value) if isinstance(value, QuantizedMatrix) else value
        return variable.replace(wide)

    return nnx.merge(graph, nnx.map_state(plain, params), rest)


@pytest.mark.parametrize("tokens", [1, 8, 32, 4096])
@pytest.mark.parametrize("format", TOLERANCE)
def test_a_layer(format, tokens):
    dispatch = Dropless() if tokens > 1000 else Touched()
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = quantize_model(layer(dispatch, jnp.bfloat16), format_named(format), jnp.dtype("bfloat16"))
        exact = stood_for(model)
        exact.dtype = exact.experts.dtype = jnp.dtype("float32")
        exact.config = replace(exact.config, dispatch=Dropless())
        x = jax.random.normal(jax.random.key(tokens), (1, tokens, WIDTH), jnp.bfloat16)
        x, ids, mask = jax.sharding.reshard(
            (x, jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens), bool)), spec("batch")
        )
        call = nnx.jit(lambda model, x: model(x, ids, mask)[0])
        found = np.asarray(call(model, x), np.float64)
        with jax.default_matmul_precision("highest"):
            expected = np.asarray(call(exact, x.astype(jnp.float32)), np.float64)
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.quantile(error, 0.99) < 2 * TOLERANCE[format]
    assert np.median(error) < TOLERANCE[format]
