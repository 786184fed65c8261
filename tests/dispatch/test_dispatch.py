"""Every dispatch, on every mesh, against a loop over assignments in float64: output and gradients."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loop import HIDDEN, WIDTH, check, routings

from moe.dispatch import Capacity, Dropless, Gather, OneHot
from moe.errors import UserError
from moe.mesh import spec
from moe.nn.feed_forward import SWIGLU_EXPERTS
from moe.routing import Routing

DISPATCHES = [
    Dropless(tile=1),
    Dropless(tile=8),
    Dropless(tile=128),
    Capacity(capacity_factor=0.5, priority="position"),
    Capacity(capacity_factor=1.0, priority="score"),
    Capacity(capacity_factor=1.25, priority="position"),
    Capacity(capacity_factor=64.0, priority="score"),
    OneHot(capacity_factor=0.5),
    OneHot(capacity_factor=1.25),
]
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 2), (3, 4, 6, 3), (1, 16, 4, 1)]  # groups, tokens in each, experts, k


@given(
    dispatch=st.sampled_from(DISPATCHES),
    case=st.sampled_from(SHAPES).flatmap(lambda s: st.tuples(st.just(s), routings(*s))),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120)
def test_any_shape_and_routing_on_one_device(one_device, dispatch, case, seed):
    (_, tokens_per_group, num_experts, _), (per_token, token, expert) = case
    check(dispatch, per_token, token, expert, num_experts, tokens_per_group, seed)


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4", "1x8"], indirect=True)
@pytest.mark.parametrize(
    "dispatch", [Dropless(tile=4), Capacity(1.0, "position"), Capacity(0.5, "score"), OneHot(0.75)], ids=str
)
@given(routing=routings(groups=8, tokens_per_group=4, num_experts=8, k=2), seed=st.integers(0, 2**16))
@settings(max_examples=15)
def test_any_routing_on_eight_devices(mesh, dispatch, routing, seed):
    per_token, token, expert = routing
    check(dispatch, per_token, token, expert, 8, 4, seed)


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [
        ("4x2", Dropless(tile=4, chunks=2)),
        ("2x4", Dropless(tile=4, chunks=2)),
        ("4x2", Capacity(1.0, "position", chunks=2)),
        ("2x4", OneHot(0.75, chunks=2)),
    ],
    indirect=["mesh"],
)
@given(routing=routings(groups=16, tokens_per_group=4, num_experts=8, k=2), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_chunks_change_nothing(mesh, dispatch, routing, seed):
    per_token, token, expert = routing
    check(dispatch, per_token, token, expert, 8, 4, seed)


@pytest.mark.parametrize("mesh", ["4x2"], indirect=True)
def test_chunks_travel_by_themselves(mesh):
    """Each chunk has collectives of its own."""

    def layer(x, combine_weight, weights, dispatch):
        token = jnp.tile(jnp.repeat(jnp.arange(4), 2), (16, 1))
        token, expert = jax.sharding.reshard((token, jnp.zeros_like(token)), spec("batch"))
        routing = Routing(token, expert, combine_weight, scores=None, per_token=2)
        return dispatch(x, routing, weights, SWIGLU_EXPERTS).y

    mesh = jax.sharding.get_mesh()
    batch, held = (jax.NamedSharding(mesh, spec(axis)) for axis in ("batch", "expert"))
    shapes = {"w_gate": (8, WIDTH, HIDDEN), "w_up": (8, WIDTH, HIDDEN), "w_down": (8, HIDDEN, WIDTH)}
    weights = {name: jax.ShapeDtypeStruct(shape, "float32", sharding=held) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((16, 4, WIDTH), "float32", sharding=batch)
    weight = jax.ShapeDtypeStruct((16, 8), "float32", sharding=batch)
    collectives = [
        jax.jit(layer, static_argnums=3)
        .lower(x, weight, weights, Capacity(1.0, "position", exchange=Gather(), chunks=chunks))
        .as_text()
        .count("reduce_scatter")
        for chunks in (1, 2)
    ]
    assert collectives[1] == 2 * collectives[0] > 0


@pytest.mark.parametrize("mesh", ["4x2"], indirect=True)
def test_chunks_must_divide_a_devices_groups(mesh):
    token = np.tile(np.repeat(np.arange(4), 2), (16, 1))
    with pytest.raises(UserError, match="chunks=3 does not divide the 2 groups"):
        check(Dropless(tile=4, chunks=3), 2, token, np.zeros_like(token), 8, 4, seed=0)


@pytest.mark.parametrize("dispatch", [Dropless(tile=4), Capacity(1.0, "position")], ids=str)
@pytest.mark.parametrize("mesh", ["1x1", "4x2", "1x8"], indirect=True)
@pytest.mark.parametrize("busy", [0, 5, 7, 8])
def test_one_expert_takes_everything(mesh, dispatch, busy):
    """Expert 8 of 8 is nowhere: nothing at all is computed then."""
    token = np.tile(np.repeat(np.arange(4), 2), (8, 1))
    check(dispatch, 2, token, np.full_like(token, busy), 8, 4, seed=busy)


def test_capacity_must_be_positive():
    for dispatch in (Capacity, OneHot):
        with pytest.raises(UserError, match="capacity_factor"):
            dispatch(capacity_factor=0.0)
    with pytest.raises(UserError, match="chunks=0"):
        Dropless(chunks=0)


@given(seed=st.integers(0, 2**16))
@example(0)
@settings(max_examples=5)
def test_the_reference_gradients_are_differences(seed):
    """The loop's own gradients against central differences of its own output."""
    random = np.random.default_rng(seed)
    token, expert, kept = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), np.array([True, True, True, False])
    inputs = {
        "x": random.normal(size=(3, 4)),
        "combine_weight": random.normal(size=4),
        "w_gate": random.normal(size=(2, 4, 3)),
        "w_up": random.normal(size=(2, 4, 3)),
        "w_down": random.normal(size=(2, 3, 4)),
    }
    y_bar = random.normal(size=(3, 4))

    def outcome(x, combine_weight, **weights):
        return naive.experts(x, token, expert, combine_weight, kept, weights, y_bar)

    _, x_bar, weight_bar, weights_bar = outcome(**inputs)
    for name, gradient in {"x": x_bar, "combine_weight": weight_bar, **weights_bar}.items():
        direction = random.normal(size=gradient.shape)
        up, down = (
            (outcome(**inputs | {name: inputs[name] + step * direction})[0] * y_bar).sum()
            for step in (1e-5, -1e-5)
        )
        assert (gradient * direction).sum() == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-8)
