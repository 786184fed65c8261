"""A model over quantised matrices: against the same model over what they stand for, on 1 and 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.dispatch import Capacity, Dropless
from moe.errors import UserError
from moe.mesh import spec
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, build
from moe.nn.quantized import fake_quantize_params, pretend, quantize_model, quantize_params
from moe.quant import Format, Quantization, QuantizedMatrix, dequantize
from moe.routing import SMEAR, TopK

INT4 = Format("int4", 8)
DEFAULTS = {
    "num_experts": 4,
    "expert_width": 16,
    "routing": TopK(k=2),
    "balance": (),
    "dispatch": Dropless(tile=4),
}


def model(layers="DM", learned_clipping="", **moe):
    config = TransformerConfig(
        vocab_size=48,
        width=32,
        layers=layers,
        dense_width=32,
        attention=AttentionConfig(heads=2, kv_heads=1, head_width=8),
        moe=MoEConfig(**DEFAULTS | moe),
        compute_dtype="float32",
        learned_clipping=learned_clipping,
    )
    return build(config, jax.random.key(0))


def logits(model, params):
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    tokens = np.random.default_rng(0).integers(0, 48, (8, 12))

    @jax.jit
    def run(params, rest):
        whole = nnx.merge(graph, params, rest)
        hidden, _ = whole(jnp.asarray(tokens))
        return jax.sharding.reshard(whole.logits(hidden), spec())

    return np.asarray(run(params, rest))


def stood_for(params):
    """Every quantised matrix as an ordinary one."""

    def one(variable):
        value = variable.get_value()
        return variable.replace(dequantize(value)) if isinstance(value, QuantizedMatrix) else variable

    return nnx.from_flat_state([(path, one(variable)) for path, variable in nnx.to_flat_state(params)])


@pytest.mark.parametrize(
    ("mesh", "format"), [("1x1", INT4), ("4x2", INT4), ("4x2", Format("int8"))], indirect=["mesh"]
)
def test_logits_are_those_of_the_dequantised_weights(mesh, format):
    whole = model()
    params = nnx.state(whole, nnx.Param)
    quantised = quantize_params(params, format, jnp.dtype("float32"))
    one = jax.sharding.get_mesh().size == 1
    expected = logits(whole, stood_for(quantised) if one else fake_quantize_params(params, format))
    found = logits(whole, quantised)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    plain = logits(whole, params)
    assert 1e-3 < np.abs(found - plain).mean() / np.abs(plain).mean() < 0.5


def test_activations_are_rounded_under_a_dynamic_format(one_device):
    whole = model()
    params = nnx.state(whole, nnx.Param)
    weights_only = logits(whole, quantize_params(params, Format("int8"), jnp.dtype("float32")))
    both = logits(whole, quantize_params(params, Format("int8", dynamic=True), jnp.dtype("float32")))
    assert 1e-4 < np.abs(both - weights_only).mean() / np.abs(weights_only).mean() < 0.1


def test_what_is_quantised(one_device):
    whole = model(shared_experts=1, shared_gate="sigmoid", latent_width=16)
    params = nnx.state(quantize_model(whole, INT4, jnp.dtype("bfloat16")), nnx.Param)
    formats, kept = {}, {}
    for path, variable in nnx.to_flat_state(params):
        value, name = variable.get_value(), ".".join(str(part) for part in path[-2:])
        if isinstance(value, QuantizedMatrix):
            formats[name] = value.format
        else:
            kept[name] = value.dtype
    experts = {
        f"{where}.w_{what}" for where in ("dense", "experts", "shared") for what in ("gate", "up", "down")
    }
    attention = {f"attention.w_{what}" for what in ("q", "k", "v", "out")}
    assert set(formats) == experts | attention | {"latent.w_up", "latent.w_down", "head"}
    assert formats.pop("head") == Format("int8")
    assert set(formats.values()) == {INT4}
    assert kept.pop("embedding") == jnp.bfloat16
    assert {"router.w", "shared.w_shared_gate"} < set(kept)
    assert set(kept.values()) == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "other",
    [
        {"dispatch": Capacity()},
        {"routing": SMEAR()},
        {"expert_width": (8, 8, 16, 16)},
    ],
    ids=str,
)
def test_other_ways_through_the_experts(one_device, other):
    whole = model(layers="M", **other)
    quantised = quantize_params(nnx.state(whole, nnx.Param), Format("int8"), jnp.dtype("float32"))
    np.testing.assert_allclose(
        logits(whole, quantised), logits(whole, stood_for(quantised)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("mesh", ["4x2"], indirect=True)
def test_fake_quantisation_keeps_the_layout_and_passes_gradients(mesh):
    params = nnx.state(model(), nnx.Param)

    @jax.jit
    def run(params):
        faked, pullback = jax.vjp(lambda params: fake_quantize_params(params, INT4), params)
        return faked, pullback(params)[0]

    faked, gradient = run(params)
    for (_, before), (_, after), (_, back) in zip(
        *(nnx.to_flat_state(state) for state in (params, faked, gradient)), strict=True
    ):
        assert after[...].sharding.is_equivalent_to(before[...].sharding, before[...].ndim)
        np.testing.assert_allclose(back[...], before[...], rtol=1e-6)


def test_training_may_begin_plainly(one_device):
    params = nnx.state(model(), nnx.Param)
    assert pretend(Quantization()) is None
    seen = pretend(Quantization(train="int4-8", begin=3))
    assert seen is not None
    step, key = jnp.array(2), jax.random.key(0)
    at_two, at_three = jax.jit(seen)(params, step, key), jax.jit(seen)(params, step + 1, key)
    np.testing.assert_array_equal(at_two["head"][...], params["head"][...])
    np.testing.assert_array_equal(at_three["head"][...], fake_quantize_params(params, INT4)["head"][...])


def test_stochastic_rounding_follows_the_key(one_device):
    params = nnx.state(model(), nnx.Param)
    seen = jax.jit(pretend(Quantization(train="int4-8", rounding="stochastic")))
    draws = [seen(params, jnp.array(0), jax.random.key(i))["head"][...] for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])


@pytest.mark.parametrize("mesh", ["4x2"], indirect=True)
def test_learned_clipping_is_a_parameter_beside_each_matrix(mesh):
    whole, without = model(learned_clipping="int4-8"), model()
    params, before = nnx.state(whole, nnx.Param), nnx.state(without, nnx.Param)
    expert = params["stacks"][1]["blocks"][0]["moe"]["experts"]["w_gate_clip"]
    assert expert.shape == (1, 4, 4, 16)
    assert expert.get_metadata("out_sharding") == ("layer", "expert", None, "norm")
    found = logits(whole, fake_quantize_params(params, INT4))
    expected = logits(without, fake_quantize_params(before, INT4))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    halved = jax.tree.map(lambda x: x, params)
    halved["head_clip"] = halved["head_clip"].replace(halved["head_clip"][...] * 0.5)
    head = quantize_params(halved, INT4, jnp.dtype("float32"))["head"].get_value()
    assert np.abs(dequantize(head)).max() < 0.51 * np.abs(params["head"][...]).max()


def test_a_group_that_does_not_fit_is_named(one_device):
    with pytest.raises(UserError, match="group_size=24 does not divide the 32 inputs"):
        quantize_params(nnx.state(model(), nnx.Param), Format("int4", 24), jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "int3"}, "'int3' is no format"),
        ({"train": "int8-dynamic"}, "rounds weights only"),
        ({"begin": -1}, "begin=-1"),
        ({"train": "fp8", "rounding": "stochastic"}, "fp8 rounds to the nearest"),
    ],
)
def test_what_cannot_be_trained_for_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Quantization(**fields)
