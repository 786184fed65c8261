"""Causal attention: which implementation is taken where, that cuDNN's can be compiled for a mesh, and splash
attention, simulated, against the plain one.

What it computes is tested with the layer (tests/nn/test_attention.py), and on a GPU by tests/accelerators.
"""

import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels import attention
from moe.kernels.attention import causal_attention
from moe.mesh import AXES, spec

KINDS = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-80GB"}


def installed_cudnn():
    """Context in which JAX finds a cuDNN, to trace with."""
    return mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", return_value=91000)


def traced(dtype="bfloat16", sequence=256, heads=4, kv_heads=2, width=64):
    """The gradients of a batch of 8 on the mesh that is set."""

    def gradients(q, k, v):
        return jax.grad(lambda *a: causal_attention(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    split = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec("batch"))
    q, k, v = (
        jax.ShapeDtypeStruct((8, sequence, n, width), dtype, sharding=split)
        for n in (heads, kv_heads, kv_heads)
    )
    return jax.jit(gradients).trace(q, k, v)


def test_cudnn_compiles_forward_and_backward_for_a_mesh(mesh):
    with installed_cudnn(), mock.patch("moe.kernels.attention.fits_cudnn", return_value=True):
        program = traced()
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"__cudnn\$\w+", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert "CAUSAL" in text
    assert f"tensor<{8 // jax.sharding.get_abstract_mesh().size}x256x4x64xbf16>" in text
    assert all(out.sharding.spec[0] == spec("batch")[0] for out in program.out_info)


@pytest.mark.parametrize(
    ("kind", "fields", "fused"),
    [
        ("H100", {"dtype": "float16"}, True),
        ("A100", {"kv_heads": 4, "width": 128, "sequence": 130}, True),
        ("H100", {"dtype": "float32"}, False),
        ("H100", {"width": 40}, False),
        ("H100", {"sequence": 257}, False),
        ("H100", {"sequence": 64}, False),
        ("AMD Instinct MI300X", {}, False),
    ],
)
def test_what_cudnn_does_not_take_is_left_to_xla(kind, fields, fused):
    device = jax.sharding.AbstractDevice(device_kind=KINDS.get(kind, kind), num_cores=132, platform="gpu")
    ones, kinds = (1,) * len(AXES), (jax.sharding.AxisType.Explicit,) * len(AXES)
    mesh = jax.sharding.AbstractMesh(ones, AXES, axis_types=kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), installed_cudnn():
        assert ("dot_product_attention_bwd" in str(traced(**fields).jaxpr)) == fused


def test_a_cpu_takes_xla(one_device):
    assert "dot_product_attention_fwd" not in str(traced().jaxpr)


@pytest.mark.parametrize("mesh", ["1x1", "4x2"], indirect=True)
def test_splash_attention_gives_what_the_plain_one_gives(mesh):
    # Two blocks a side: one wholly behind, one wholly ahead, two on the diagonal.
    rng = np.random.default_rng(0)
    shapes = [(8, 256, heads, 128) for heads in (2, 1, 1)]
    q, k, v = (jax.device_put(rng.normal(size=s).astype(np.float32), spec("batch")) for s in shapes)
    y_bar = jax.device_put(rng.normal(size=shapes[0]).astype(np.float32), spec("batch"))

    @jax.jit
    def with_gradients(q, k, v, y_bar):
        y, vjp = jax.vjp(causal_attention, q, k, v)
        return y, *vjp(y_bar)

    expected = with_gradients(q, k, v, y_bar)
    simulated = partial(attention.splash, interpret=True)
    with mock.patch.multiple(attention, fits_splash=lambda q: True, splash=simulated, LARGEST_BLOCK=128):
        jax.clear_caches()
        found = with_gradients(q, k, v, y_bar)
    for value, other in zip(found, expected, strict=True):
        assert value.sharding.spec == other.sharding.spec
        np.testing.assert_allclose(value, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("fields", "splash"),
    [
        ({"width": 128}, True),
        ({"width": 128, "sequence": 384}, True),
        ({"width": 128, "sequence": 200}, False),
        ({"width": 64}, False),
        ({"width": 128, "dtype": "float32"}, False),
    ],
)
def test_what_splash_attention_does_not_take_is_left_to_xla(fields, splash):
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    ones, kinds = (1,) * len(AXES), (jax.sharding.AxisType.Explicit,) * len(AXES)
    mesh = jax.sharding.AbstractMesh(ones, AXES, axis_types=kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert ("splash_mha_dkv" in str(traced(**fields).jaxpr)) == splash


def test_blocks_cut_a_sequence_whole():
    assert [attention.block_length(s) for s in (128, 384, 1024, 1536, 4096, 32768)] == [
        128,
        384,
        1024,
        768,
        1024,
        1024,
    ]
