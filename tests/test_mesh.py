"""The mesh and the table of axes."""

from dataclasses import replace

import jax
import pytest
from jax.sharding import PartitionSpec as P

from moe.errors import UserError
from moe.mesh import MeshConfig, axes, axis_size, make_mesh, spec
from moe.nn import AttentionConfig, LatentAttentionConfig, MoEConfig, TransformerConfig, check_layout


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(expert=4), (1, 2, 4, 1, 1)),
        (MeshConfig(fsdp=2, expert=4), (1, 2, 4, 1, 1)),
        (MeshConfig(data=-1, fsdp=1, expert=2, tensor=2), (2, 1, 2, 1, 2)),
        (MeshConfig(data=2, sequence=2), (2, 2, 1, 2, 1)),
    ],
)
def test_an_open_axis_takes_what_is_left(config, shape):
    assert tuple(make_mesh(config).shape.values()) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(expert=3), "mesh.expert=3 does not divide the 8 devices"),
        (MeshConfig(expert=0), "mesh.expert=0"),
        (MeshConfig(expert=16), "mesh.expert=16"),
        (MeshConfig(fsdp=2, expert=2), "mesh.fsdp=2 x mesh.expert=2 needs 4 devices, here are 8"),
        (MeshConfig(data=4, expert=4), "mesh.data=4 x mesh.expert=4 needs 16 devices"),
        (MeshConfig(data=-1), "mesh.data and mesh.fsdp are both -1"),
    ],
)
def test_a_mesh_uses_all_devices(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_one_device_is_a_mesh_too():
    assert tuple(make_mesh(MeshConfig(), jax.devices()[:1]).shape.values()) == (1, 1, 1, 1, 1)


def test_specs_follow_the_table():
    assert spec() == P()
    assert spec("batch") == P(("data", "fsdp", "expert"))
    assert spec("expert", "expert_embed", "mlp") == P("expert", ("fsdp", "sequence"), "tensor")
    assert spec(None, "layer") == P(None, None)
    with pytest.raises(KeyError):
        spec("colour")


@pytest.mark.parametrize("mesh", ["4x2"], indirect=True)
def test_axis_sizes_are_those_of_the_mesh_that_is_set(mesh):
    assert (axis_size("fsdp"), axis_size("expert"), axis_size("tensor")) == (4, 2, 1)


@pytest.mark.parametrize("mesh", ["4x2"], indirect=True)
def test_types_name_only_axes_of_several_devices(mesh):
    assert spec("batch", "sequence", "mlp") == P(("fsdp", "expert"), None, None)
    assert spec("expert", "expert_embed") == P("expert", "fsdp")
    assert (axes("group"), axes("expert"), axes("mlp")) == (("fsdp", "expert"), ("expert",), ())


MODEL = TransformerConfig(
    vocab_size=64,
    width=32,
    layers="DM",
    attention=AttentionConfig(heads=8, kv_heads=4),
    dense_width=64,
    moe=MoEConfig(num_experts=8, expert_width=16),
)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ({"fsdp": 8}, {"width": 36}, r"model.width=36 is stored in parts on 8 devices \(mesh.fsdp=8\)"),
        ({"tensor": 8}, {"vocab_size": 68}, r"model.vocab_size=68 .* \(mesh.tensor=8\)"),
        ({"sequence": 4, "tensor": 2}, {}, r"kv_heads=4 .* 8 devices \(mesh.tensor=2 x mesh.sequence=4\)"),
        ({"tensor": 4}, {"dense_width": 66}, "model.dense_width=66"),
        ({"tensor": 4}, {"moe": replace(MODEL.moe, expert_width=18)}, "model.moe.expert_width=18"),
        ({"fsdp": 8}, {"attention": LatentAttentionConfig(kv_rank=20)}, "model.attention.kv_rank=20"),
        ({"sequence": 2}, {"layers": "m"}, "choose among whole sequences; set mesh.sequence=1"),
        (
            {"sequence": 2},
            {},
            "tokens_per_group=0 makes groups of 64 tokens, but mesh.sequence=2 leaves a device 32",
        ),
        (
            {"expert": 8},
            {"moe": replace(MODEL.moe, num_experts=12)},
            "mesh.expert=8 does not divide model.moe",
        ),
        ({"fsdp": 8}, {"moe": replace(MODEL.moe, tokens_per_group=256)}, "leaves 2 groups for 8 devices"),
    ],
)
def test_what_cannot_be_laid_out_says_why(mesh, changes, message):
    mesh = MeshConfig(**{"fsdp": 1, "data": -1} | mesh)
    with pytest.raises(UserError, match=message) as refusal:
        check_layout(replace(MODEL, **changes), mesh, 8, sequences=8, length=64)
    assert "\n" not in str(refusal.value)


def test_chunks_of_the_loss_divide_what_a_device_has():
    with pytest.raises(UserError, match=r"train.loss_chunks=4 does not divide the 2 tokens"):
        check_layout(
            replace(MODEL, layers="D"), MeshConfig(tensor=4), 8, sequences=8, length=8, loss_chunks=4
        )
