"""What a run is told to need, against what XLA compiled for it on eight simulated devices."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from moe.analysis.layout import Step, memory, table, traffic
from moe.dispatch import AllToAll, Dropless, Gather
from moe.mesh import MeshConfig, make_mesh, spec
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, structure
from moe.optim import AdamW
from moe.routing import TopK
from moe.training.state import abstract_state
from moe.training.step import make_train_step
from tpu.collectives import Mesh, collective
from tpu.hlo import Module

SEQUENCES, LENGTH = 32, 256
# Unrolled, so that every collective stands in the program as often as it is made; in float32, for XLA's CPU
# backend has no bfloat16 collectives.
MODEL = TransformerConfig(
    vocab_size=2048,
    width=256,
    layers="DM",
    attention=AttentionConfig(heads=8, kv_heads=4, head_width=32),
    dense_width=1024,
    moe=MoEConfig(
        num_experts=16,
        expert_width=256,
        routing=TopK(k=2),
        dispatch=Dropless(tile=32, exchange=Gather()),
        tokens_per_group=64,
    ),
    compute_dtype="float32",
    unroll=True,
)
TO_ALL = replace(MODEL.moe, dispatch=Dropless(tile=32, exchange=AllToAll(1e6)))  # no further rounds
CASES = {
    "gather": (MeshConfig(fsdp=4, expert=2), {"remat": "full"}),
    "all-to-all": (MeshConfig(data=2, fsdp=1, expert=4), {"moe": TO_ALL}),
    "tensor and sequence": (MeshConfig(fsdp=2, sequence=2, tensor=2), {"layers": "M"}),
}
SUMS = ("all-reduce", "reduce-scatter")


def compiled(model):
    """The train step and its state."""
    graph, shapes = structure(model)
    transformation = AdamW().build(shapes, 10)
    state = abstract_state(model, transformation, average=False)
    split = jax.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    tokens = jax.ShapeDtypeStruct((SEQUENCES, LENGTH + 1), jnp.int32, sharding=split)
    slices = jax.ShapeDtypeStruct((SEQUENCES,), jnp.int32, sharding=split)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(graph, transformation, accumulation=1, chunks=1)
    return jax.jit(step, static_argnums=4).lower(state, key, tokens, slices, 1).compile(), state


def collectives(program) -> Counter:
    """Bytes of whole arrays by kind; a sum is one whether each device keeps all of it or a part."""
    module, found = Module.parse(program.as_text()), Counter()
    mesh = Mesh(dict(jax.sharding.get_mesh().shape))
    for where in module.computations.values():
        for instruction in where.instructions.values():
            if each := collective(module, where, instruction, mesh):
                found["sum" if each.kind in SUMS else each.kind] += each.payload
    return found


def told(step):
    """The same of the account. Sums into parts that are then summed over other axes are one sum here."""
    found, into_parts = Counter(), set()
    for each in sorted(traffic(step), key=lambda each: each.collective, reverse=True):
        kind = "sum" if each.collective in SUMS else each.collective
        if each.collective == "reduce-scatter":
            into_parts.add(each.what)
        found[kind] += 0 if each.collective == "all-reduce" and each.what in into_parts else each.payload
    return found


@pytest.mark.parametrize("case", CASES)
def test_memory_and_traffic_are_those_of_the_compiled_step(case):
    """The state to 1 %, all memory within a third, each kind of collective within 15 %."""
    mesh, changes = CASES[case]
    with jax.set_mesh(make_mesh(mesh)):
        model = replace(MODEL, **changes)
        program, state = compiled(model)
        step = Step(model, SEQUENCES, LENGTH)
        parts = {"parameters": state.params, "optimizer": state.optimizer}
        expected, bytes_of = told(step), memory(step, parts)
        analysis, found = program.memory_analysis(), collectives(program)
        text, traffic_told = table(step, parts), traffic(step)

    held = bytes_of["parameters"] + bytes_of["optimizer"]
    assert held == pytest.approx(analysis.argument_size_in_bytes, rel=0.01)
    whole = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert 2 / 3 < sum(bytes_of.values()) / whole < 3 / 2
    for kind in expected.keys() | {kind for kind, size in found.items() if size > 1e6}:
        assert expected[kind] == pytest.approx(found[kind], rel=0.15), (kind, expected, found)
    assert text.startswith(f"a device holds about {sum(bytes_of.values()) / 2**20:.3g} MiB: parameters ")
    assert all(f"{each.what}: {each.collective} along" in text for each in traffic_told[:5])


@pytest.mark.parametrize("mesh", ["1x1"], indirect=True)
def test_one_device_sends_nothing(mesh):
    step = Step(MODEL, SEQUENCES, LENGTH)
    assert traffic(step) == []
    told = table(step, {"parameters": jax.ShapeDtypeStruct((2**28,), "float32")})
    assert "parameters 1 GiB" in told and "\n" not in told


@pytest.mark.parametrize("mesh", ["1x8"], indirect=True)
def test_what_an_exchange_sends_and_holds(mesh):
    """Gathering sends every token to everyone and makes room for all of them; the other follows use."""

    def of(exchange, k):
        moe = replace(MODEL.moe, routing=TopK(k=k), dispatch=Dropless(exchange=exchange))
        step = Step(replace(MODEL, moe=moe), SEQUENCES, LENGTH)
        sent = sum(each.sent for each in traffic(step) if each.what in ("tokens", "sums", "tokens and sums"))
        return sent, memory(step, {"parameters": []})["activations"]

    for k in (1, 2):
        gathered, exchanged = of(Gather(), k), of(AllToAll(), k)
        assert exchanged[0] < gathered[0] * 1.4 * (1 - (7 / 8) ** k)
        assert exchanged[1] < gathered[1] / 1.5


def test_what_the_card_has_stands_beside_what_it_needs(monkeypatch):
    h100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
    monkeypatch.setattr("moe.analysis.layout.present_device", lambda: h100)
    with jax.set_mesh(make_mesh(MeshConfig())):
        told = table(
            Step(MODEL, SEQUENCES, LENGTH), {"parameters": jax.ShapeDtypeStruct((2**28,), "float32")}
        )
    assert " GiB of its 80 GiB: parameters 1 GiB, " in told
