"""Every exchange, on every mesh, against the same loop; what travels, and that nothing can overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import HIDDEN, WIDTH, check, routings

from moe.dispatch import AllToAll, Auto, Capacity, Dropless, Gather, OneHot, RaggedAllToAll
from moe.dispatch.rounds import PARTS, Buffers, Rounds
from moe.errors import UserError
from moe.mesh import MeshConfig, make_mesh, spec
from moe.nn import MoEConfig
from moe.nn.feed_forward import SWIGLU_EXPERTS
from moe.routing import DefaultMoE, Routing

ROOM = {"too little": 0.2, "usual": 1.25, "for the worst": 64.0}
CASES = [
    ("4x2", Dropless(tile=4, exchange=AllToAll(ROOM["usual"]))),
    ("2x4", Dropless(tile=4, exchange=AllToAll(ROOM["too little"]), chunks=2)),
    ("1x8", Dropless(tile=4, exchange=RaggedAllToAll(ROOM["for the worst"]))),
    ("1x8", Capacity(1.0, "position", exchange=AllToAll(ROOM["too little"]))),
    ("2x4", Capacity(0.5, "score", exchange=RaggedAllToAll(ROOM["usual"]), chunks=3)),
    ("2x4", OneHot(0.75, exchange=AllToAll(ROOM["usual"]))),
    ("1x8", OneHot(1.25, exchange=Auto())),
]


@pytest.mark.parametrize(("mesh", "dispatch"), CASES, indirect=["mesh"], ids=str)
@given(routing=routings(groups=8, tokens_per_group=4, num_experts=8, k=2), seed=st.integers(0, 2**16))
@settings(max_examples=12)
def test_any_routing_comes_back_whole(mesh, dispatch, routing, seed):
    per_token, token, expert = routing
    check(dispatch, per_token, token, expert, 8, 4, seed, keep_outputs=False)


@pytest.mark.parametrize("exchange", [Gather(), AllToAll(0.2), RaggedAllToAll(1.0)], ids=str)
@pytest.mark.parametrize(
    "axes", [{"expert": 2, "sequence": 2, "tensor": 2}, {"data": 2, "expert": 4}], ids=str
)
def test_any_mesh_brings_them_back(axes, exchange):
    """Hidden units are split in these meshes, tokens along `sequence`, weights repeated along `data`."""
    random, token = np.random.default_rng(0), np.tile(np.repeat(np.arange(4), 2), (8, 1))
    with jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1} | axes))):
        expert = random.integers(0, 8, token.shape)
        check(Dropless(tile=4, exchange=exchange), 2, token, expert, 8, 4, seed=1, keep_outputs=False)


@pytest.mark.parametrize("busy", [0, 7, 8])
@pytest.mark.parametrize("mesh", ["1x8"], indirect=True)
def test_one_device_takes_everything(mesh, busy):
    """Round after round; expert 8 of 8 is nowhere, and then no round is needed."""
    token = np.tile(np.repeat(np.arange(4), 2), (8, 1))
    dispatch = Dropless(tile=4, exchange=AllToAll(0.5))
    check(dispatch, 2, token, np.full_like(token, busy), 8, 4, seed=busy, keep_outputs=False)


@given(
    counts=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=40),
    k=st.integers(1, 4),
    rounds=st.integers(1, 3),
    room=st.floats(0.05, 4),
)
@settings(max_examples=60)
def test_rounds_take_every_token_once_and_no_buffer_overflows(counts, k, rounds, room):
    counts = np.array(counts)
    tokens, devices = counts.shape
    buffers = Buffers.sized(tokens, k, 3, devices, rounds, room)
    number = np.asarray(Rounds.of(jnp.asarray(counts), buffers).number)
    np.testing.assert_array_equal(number >= 0, counts > 0)
    for device in range(devices):
        mine = number[counts[:, device] > 0, device]
        assert np.all(np.diff(mine) >= 0)
        for made in range(number.max() + 1):
            here = number[:, device] == made
            assert here.sum() <= buffers.places
            assert counts[here, device].sum() <= buffers.assignments
    if buffers.hold(tokens):
        assert number.max() <= 0


@pytest.mark.parametrize(("devices", "k"), [(2, 8), (2, 2), (8, 8), (8, 1)])
@pytest.mark.parametrize("rounds", [1, 4])
def test_even_use_needs_no_further_rounds(devices, k, rounds):
    """Any experts of 64, drawn evenly, with the usual room."""
    random = np.random.default_rng(0)
    expert = np.stack([random.permutation(64)[:k] for _ in range(4096)])
    counts = (expert[..., None] // (64 // devices) == np.arange(devices)).sum(1)
    buffers = Buffers.sized(4096, k, k, devices, rounds, AllToAll().room)
    number = np.asarray(Rounds.of(jnp.asarray(counts), buffers).number)
    assert number.max() == rounds - 1
    tight = Rounds.of(jnp.asarray(counts), Buffers.sized(4096, k, k, devices, rounds, 0.9))
    assert buffers.hold(4096) or np.asarray(tight.number).max() == rounds


def test_the_places_of_a_round():
    timetable = Rounds.of(jnp.array([[1, 0], [2, 1], [0, 1]]), Buffers(2, 2, PARTS, 2))
    np.testing.assert_array_equal(timetable.number, [[0, -1], [0, 0], [-1, 0]])
    plan, taken = timetable.plan(0)
    np.testing.assert_array_equal(plan.row_token(padding=-1), [0, 1, 1, 2])
    np.testing.assert_array_equal(taken, [2, 2])


def test_buffers_follow_the_mean_and_not_the_worst():
    """With 8 of 64 experts on 64 devices a token goes to 7.6 of them, and nobody makes room for 64."""
    buffers = Buffers.sized(tokens=1024, k=8, per_token=8, devices=64, rounds=1, room=1.25)
    assert 64 * buffers.places < 1.4 * 1024 * 64 * (1 - (63 / 64) ** 8)
    assert 64 * buffers.assignments < 2 * 8192


def text_of(dispatch, groups=16, tokens=4, platform="cpu", k=2, *, gradient=False):
    """The lowered layer, on the mesh that is set."""

    def layer(x, combine_weight, weights):
        token = jnp.tile(jnp.repeat(jnp.arange(tokens), k), (groups, 1))
        token, expert = jax.sharding.reshard((token, jnp.zeros_like(token)), spec("group"))
        routing = Routing(token, expert, combine_weight, scores=None, per_token=k)
        return dispatch(x, routing, weights, SWIGLU_EXPERTS).y

    def both(*arguments):
        return jax.grad(lambda *a: layer(*a).sum(), argnums=(0, 1, 2))(*arguments)

    mesh = jax.sharding.get_abstract_mesh()
    batch, held = (jax.NamedSharding(mesh, spec(axis)) for axis in ("group", "expert"))
    shapes = {"w_gate": (8, WIDTH, HIDDEN), "w_up": (8, WIDTH, HIDDEN), "w_down": (8, HIDDEN, WIDTH)}
    weights = {name: jax.ShapeDtypeStruct(shape, "float32", sharding=held) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((groups, tokens, WIDTH), "float32", sharding=batch)
    weight = jax.ShapeDtypeStruct((groups, tokens * k), "float32", sharding=batch)
    traced = jax.jit(both if gradient else layer).trace(x, weight, weights)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
def test_a_token_travels_once_to_a_device(mesh):
    """However many experts it has there: buffers are as large with 4 experts a token as with 1."""
    room = AllToAll(1e6)
    for k in (1, 4):
        text = text_of(Dropless(tile=4, exchange=room), k=k)
        assert text.count("stablehlo.while") == 0, "a buffer that holds everything needs no further rounds"
        sent = [line for line in text.splitlines() if "all_to_all" in line and f"x{WIDTH}xf32" in line]
        assert len(sent) == 2  # there and back
        assert all(f"tensor<{4 * 8}x{WIDTH}xf32>" in line for line in sent)  # 8 tokens, 4 devices


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
def test_chunks_are_rounds_that_travel_by_themselves(mesh):
    one, three = (
        text_of(Dropless(tile=4, exchange=AllToAll(), chunks=n)).count("all_to_all") for n in (1, 3)
    )
    assert three - one == 2 * 4  # tokens, combine weights, experts, and sums on their way back


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
def test_a_ragged_exchange_is_one_where_the_platform_has_it(mesh):
    """Elsewhere the same places travel whole."""
    dispatch = Dropless(tile=4, exchange=RaggedAllToAll(64.0))
    assert "ragged_all_to_all" not in text_of(dispatch, gradient=True)
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    devices = jax.sharding.get_abstract_mesh()
    there = jax.sharding.AbstractMesh(
        devices.axis_sizes, devices.axis_names, axis_types=devices.axis_types, abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(there):
        text = text_of(dispatch, platform="tpu", gradient=True)
    assert text.count("ragged_all_to_all") >= 2 * 2  # forward and backward, there and back


@pytest.mark.parametrize(
    ("devices", "k", "kind", "chosen"),
    [
        (2, 8, "NVIDIA H200", Gather()),
        (2, 2, "NVIDIA H200", Gather()),
        (4, 2, "NVIDIA H200", AllToAll()),
        (8, 8, "NVIDIA H200", AllToAll()),
        (4, 8, "NVIDIA H200", Gather()),
        (64, 8, "TPU v6 lite", RaggedAllToAll()),
        (64, 8, "TPU v5 lite", AllToAll()),  # whose compiler refuses to send exact counts
        (2, 8, "TPU v6 lite", Gather()),
    ],
)
def test_the_rule_counts_what_travels(devices, k, kind, chosen):
    platform = "tpu" if kind.startswith("TPU") else "cuda"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    assert Auto().choose(devices, k, device, keep_outputs=False) == chosen
    assert Auto().choose(devices, k, device, keep_outputs=True) == Gather()


def test_an_exchange_that_brings_sums_refuses_what_reads_outputs():
    with pytest.raises(UserError, match="brings back sums only"):
        MoEConfig(num_experts=8, routing=DefaultMoE(k=2), balance=(), dispatch=Dropless(exchange=AllToAll()))
    with pytest.raises(UserError, match=r"exchange.room=0 must be positive"):
        AllToAll(0)
