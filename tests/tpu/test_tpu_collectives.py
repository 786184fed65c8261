"""Who sends what to whom: the notations in which XLA writes groups, fused collectives, gathered experts."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu.collectives import Mesh, collective, gathered
from tpu.hlo import Module

MESH = Mesh({"data": 2, "expert": 4})

FUSED = """%all-reduce-scatter.4 (input: bf16[16,1024,2048]) -> bf16[16,1024,1024] {
  %input = bf16[16,1024,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.82 = bf16[16,1024,2048]{2,1,0} all-reduce(%input), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %zero = s32[] constant(0)
  ROOT %part = bf16[16,1024,1024]{2,1,0} dynamic-slice(%all-reduce.82, %zero)
}

%wrapped (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[16]{0} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%sparse_core (q: f32[8]) -> f32[16] {
  %q = f32[8]{0} parameter(0)
  ROOT %fused = f32[16]{0} fusion(%q), kind=kCustom, calls=%wrapped
}

ENTRY %main (x: bf16[16,1024,2048], y: f32[8]) -> bf16[16,1024,1024] {
  %x = bf16[16,1024,2048]{2,1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %begun = ((f32[8]), f32[16], u32[]) async-start(%y), calls=%wrapped
  %ended = f32[16]{0} async-done(%begun)
  %call = ((), (), s32[]) call-start(), async_execution_thread="sparsecore", to_apply=%sparse_core
  %given = ((f32[8]), f32[16]) call-update(%call, %y)
  %returned = f32[16]{0} call-done(%given)
  ROOT %fusion.568 = bf16[16,1024,1024]{2,1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.4
}
"""


def sent_by(line: str, name: str = "op"):
    """The collective of one line, whose operand is an f32[64]."""
    text = f"ENTRY %main (x: f32[64]) -> f32[1] {{\n  %x = f32[64]{{0}} parameter(0)\n  {line}\n}}"
    main = Module.parse(text).computations["main"]
    return collective(Module.parse(text), main, main.instructions[name], MESH)


@pytest.mark.parametrize(
    ("groups", "axes", "first"),
    [
        ("mesh['data'=2,'expert'=4] {'expert'}", ("expert",), (0, 1, 2, 3)),
        ("mesh['data'=2,'expert'=4] {'expert','data'}", ("data", "expert"), tuple(range(8))),
        ("[2,4]<=[8]", ("expert",), (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", ("data",), (0, 4)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), (0, 4)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("expert",), (0, 1)),
        ("{}", ("data", "expert"), tuple(range(8))),
    ],
)
def test_groups_in_every_notation(groups, axes, first):
    line = f"ROOT %op = f32[64]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    sent = sent_by(line)
    assert (sent.axes, sent.group, sent.payload) == (axes, first, 256)
    assert sent.sent == 2 * 256 * (len(first) - 1) // len(first)


@pytest.mark.parametrize(
    ("line", "kind", "payload", "sent", "concurrent"),
    [
        ("%op = f32[256]{0} all-gather(%x), replica_groups=[2,4]<=[8]", "all-gather", 1024, 768, False),
        (
            "%op = (f32[64], f32[256]) all-gather-start(%x), replica_groups=[2,4]<=[8]",
            "all-gather",
            1024,
            768,
            True,
        ),
        ("%op = f32[16]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]", "reduce-scatter", 256, 192, False),
        ("%op = f32[64]{0} all-to-all(%x), replica_groups=[2,4]<=[8]", "all-to-all", 256, 192, False),
        (
            "%op = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute",
            256,
            256,
            False,
        ),
    ],
)
def test_bytes_of_every_kind(line, kind, payload, sent, concurrent):
    found = sent_by("ROOT " + line)
    assert (found.kind, found.axes) == (kind, ("expert",))
    assert (found.payload, found.sent, found.concurrent) == (payload, sent, concurrent)


def test_what_hides_in_fusions_is_found():
    module = Module.parse(FUSED)
    main = module.computations["main"]
    scattered = collective(module, main, main.instructions["fusion.568"], MESH)
    assert scattered
    assert (scattered.kind, scattered.axes, scattered.payload) == (
        "reduce-scatter",
        ("data",),
        2 * 16 * 1024 * 2048,
    )
    for name in ("begun", "call"):
        begun = collective(module, main, main.instructions[name], MESH)
        assert begun
        assert (begun.kind, begun.axes, begun.payload, begun.concurrent) == (
            "all-gather",
            ("data",),
            64,
            True,
        )
    for name in ("ended", "given", "returned"):
        assert collective(module, main, main.instructions[name], MESH) is None


@pytest.mark.parametrize("whole", [False, True])
def test_experts_gathered_whole_are_noticed(whole):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), (jax.sharding.AxisType.Auto,) * 2)
    experts, tokens = NamedSharding(mesh, P("expert", "data")), NamedSharding(mesh, P(("data", "expert")))
    kept = NamedSharding(mesh, P() if whole else P("expert"))
    w = jax.device_put(np.ones((8, 16, 24), np.float32), experts)
    x = jax.device_put(np.ones((32, 16), np.float32), tokens)

    @jax.jit
    def layer(w, x):
        w = jax.lax.with_sharding_constraint(w, kept)
        return jax.lax.with_sharding_constraint(jax.numpy.einsum("td,edf->etf", x, w), kept)

    module = Module.parse(layer.lower(w, x).compile().as_text())
    assert bool(gathered(module, MESH, "expert", 8, 16, 24)) == whole
