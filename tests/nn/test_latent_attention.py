"""Multi-head latent attention against head by head in float64, and over devices."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx

from moe.errors import UserError
from moe.mesh import MeshConfig, logical_rules, make_mesh
from moe.nn import LatentAttentionConfig, TransformerConfig, build

WIDTH, SEQUENCE, EPSILON = 12, 8, 1e-3
SHAPE = {"heads": 4, "kv_rank": 16, "plain_width": 6, "rotary_width": 4, "value_width": 5, "rope_theta": 50.0}


@pytest.mark.parametrize("query_rank", [0, 8])
def test_against_head_by_head(one_device, query_rank):
    config = LatentAttentionConfig(**SHAPE, query_rank=query_rank)
    shape = {"out_std": 1.0, "epsilon": EPSILON, "dtype": jnp.dtype("float32")}
    with logical_rules():
        attention = jax.eval_shape(lambda: config.build(WIDTH, **shape, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(attention)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
    x = random.normal(size=(2, SEQUENCE, WIDTH)).astype(np.float32)
    y = jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, x)

    named = {path[0]: p[...].astype(np.float64) for path, p in nnx.to_flat_state(params)}
    rule = {"heads": 4, "plain": 6, "rotary": 4, "values": 5, "theta": 50.0, "epsilon": EPSILON}
    expected = [naive.latent_attention(sequence.astype(np.float64), named, **rule) for sequence in x]
    np.testing.assert_allclose(y, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=2, expert=4), MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=["stored", "split"]
)
def test_a_model_with_it_is_the_same_on_all_meshes(mesh):
    config = TransformerConfig(
        vocab_size=32,
        width=16,
        layers="DD",
        dense_width=16,
        attention=LatentAttentionConfig(**SHAPE, query_rank=8),
        compute_dtype="float32",
    )
    tokens = np.random.default_rng(0).integers(0, 32, (8, SEQUENCE))

    def hidden(tokens):
        model = build(config, jax.random.key(0))
        return np.asarray(jax.jit(lambda model, tokens: model(tokens)[0])(model, jnp.asarray(tokens)))

    with jax.set_mesh(make_mesh(mesh, jax.devices())):
        found = hidden(tokens)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        np.testing.assert_allclose(found, hidden(tokens), rtol=1e-5, atol=1e-5)
        changed = hidden(np.where(np.arange(SEQUENCE) == SEQUENCE - 1, 0, tokens))
    np.testing.assert_allclose(changed[:, :-1], found[:, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rotary_width": 3}, "rotary_width=3"), ({"plain_width": 2, "value_width": 8}, "value_width=8")],
)
def test_bad_shapes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LatentAttentionConfig(**SHAPE | fields)
