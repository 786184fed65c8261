"""The profile of a program: kernels to parts of the model and kinds of operation, overlaps and gaps."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.analysis.profile import REST, Event, account, kernels_launched, kinds, parts
from moe.kernels import linear, linear_cross_entropy
from moe.mesh import spec
from moe.routing import Context, TopK


def test_instructions_count_under_the_innermost_file_that_is_a_part(one_device):
    def step(x, w, targets):
        routing = TopK(k=1)(linear(x, w)[0].astype(jnp.float32), None, Context(targets[0], targets[0] > 0))
        return linear_cross_entropy(x, w, targets, 1)[0] + routing.combine_weight.sum()

    split = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec("batch"))
    x = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32, sharding=split)
    targets = jax.ShapeDtypeStruct((2, 4), jnp.int32, sharding=split)
    text = jax.jit(step).lower(x, jax.ShapeDtypeStruct((8, 16), jnp.float32), targets).compile().as_text()
    assert set(parts(text).values()) == {"routing", "output head and loss", REST}


PART_OF = {"fusion.1": "norms", "custom-call.2": "attention"}


def test_overlap_counts_once_and_for_the_first():
    events = [
        Event("fusion_1", "", 100.0, 200.0),  # named after its instruction
        Event("flash", "custom-call.2", 150.0, 400.0),
        Event("flash", "custom-call.2", 160.0, 300.0),  # hidden behind the other
        Event("memset", "", 1000.0, 1100.0),
    ]
    times = account(reversed(events), PART_OF)
    assert times.span == pytest.approx(1000e-9)
    assert times.by_part() == pytest.approx({"attention": 200e-9, "norms": 100e-9, REST: 100e-9})
    assert next(iter(times.by_part())) == "attention"
    first = times.kernels[0]
    assert (first.name, first.instruction, first.calls) == ("flash", "custom-call.2", 2)
    assert times.busy == pytest.approx(400e-9)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1))
def test_busy_is_the_length_of_the_union(intervals):
    events = [Event("k", "", float(start), float(start + length)) for start, length in intervals]
    covered = {at for start, length in intervals for at in range(start, start + length)}
    times = account(events, {})
    assert times.busy == pytest.approx(len(covered) / 1e9)
    assert times.span == pytest.approx((max(covered) + 1 - min(covered)) / 1e9)


def test_kinds_and_kernels_of_a_program(one_device):
    """Two products and a sort, all in a loop, each a kernel."""

    def step(x, w):
        def body(carry):
            i, x = carry
            return i + 1, jnp.sort(x @ w @ w, axis=-1)

        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    x = jnp.ones((64, 64))
    text = jax.jit(step).lower(x, x).compile().as_text()
    found = list(kinds(text).values())
    assert "sorting and gathering" in found
    launched = kernels_launched(text)
    # Besides them the counter, its comparison, and what XLA copies.
    assert 4 <= launched <= 9
    unrolled = jax.jit(lambda x, w: (x @ w @ w).sum()).lower(x, x).compile().as_text()
    assert sum(kind == "matrix products" for kind in kinds(unrolled).values()) >= 2
    assert 0 < kernels_launched(unrolled) < launched


def test_collectives_are_communication():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %all-reduce-start.1 = f32[8]{0} all-reduce-start(%p), to_apply=%add
  ROOT %all-reduce-done.1 = f32[8]{0} all-reduce-done(%all-reduce-start.1)
}
"""
    assert kinds(text)["all-reduce-start.1"] == "communication"
    events = [Event("ncclDevKernel", "", 0.0, 30.0), Event("k", "fusion.1", 30.0, 40.0)]
    times = account(events, {}, {"fusion.1": "copies"})
    assert times.by_kind() == pytest.approx({"communication": 30e-9, "copies": 10e-9})
