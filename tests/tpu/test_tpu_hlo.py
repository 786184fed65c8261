"""Reading compiled HLO: lines as XLA's TPU compiler prints them, and programs compiled for 8 CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu.collectives import Mesh
from tpu.hlo import Module, Shape
from tpu.operations import EvenLoads, operations

LOOP = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,128], s32[])) -> (s32[], bf16[8,128], s32[]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  %step = s32[]{:T(128)} constant(STEP)
  %add.1 = s32[]{:T(128)} add(%i, %step)
  %y = bf16[8,128]{1,0} multiply(%x, %x), metadata={op_name="jit(f)/while/body/mul" stack_frame_id=3}
  ROOT %t = (s32[], bf16[8,128]{1,0}, s32[]) tuple(%add.1, %y, %n)
}

%condition (p.1: (s32[], bf16[8,128], s32[])) -> pred[] {
  %p.1 = (s32[], bf16[8,128]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=2
  ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[] constant(FIRST)
  %many = s32[] constant(10)
  %start = (s32[], bf16[8,128]{1,0}, s32[]) tuple(%zero, %a, %many)
  %while.3 = (s32[], bf16[8,128]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while.3), index=1
}
"""


def lone(*lines: str) -> Module:
    """A module of these lines, the last of which is its result."""
    *first, last = lines
    text = "\n".join([f"  {line}" for line in first] + [f"  ROOT {last}"])
    return Module.parse(f"ENTRY %main (x: f32[1]) -> f32[1] {{\n{text}\n}}\n")


@pytest.mark.parametrize(("first", "step", "runs"), [(0, 1, 10), (3, 1, 7), (0, 2, 5), (1, 4, 3), (10, 1, 0)])
def test_a_loop_runs_as_often_as_its_counter_says(first, step, runs):
    module = Module.parse(LOOP.replace("FIRST", str(first)).replace("STEP", str(step)))
    main = module.computations["main"]
    assert module.trip_count(main, main.instructions["while.3"]) == runs


def test_a_loop_without_a_constant_end_is_unknown():
    module = Module.parse(
        LOOP.replace("FIRST", "0").replace("STEP", "1").replace("constant(10)", "add(%zero, %zero)")
    )
    main = module.computations["main"]
    assert module.trip_count(main, main.instructions["while.3"]) is None
    assert [i.name for _, i in module.loops()] == ["while.3"]
    assert "y" not in {i.name for _, i, times in module.executed() if times}


def test_a_loop_that_may_end_sooner_counts_with_all_its_runs():
    both = "%more = pred[] all-reduce(%any)\n  ROOT %both = pred[] and(%lt, %more)"
    text = LOOP.replace(
        "ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT",
        f"%lt = pred[] compare(%i.1, %n.1), direction=LT\n  {both}",
    )
    module = Module.parse(text.replace("FIRST", "0").replace("STEP", "1"))
    main = module.computations["main"]
    assert module.trip_count(main, main.instructions["while.3"]) == 10


def test_an_instruction_is_read_whole():
    module = Module.parse(LOOP.replace("FIRST", "0").replace("STEP", "1"))
    body = module.computations["body"]
    assert body.instructions["x"].shapes == (Shape("bf16", (8, 128), space=1),)
    assert body.instructions["p"].shapes[1] == Shape("bf16", (8, 128))
    assert body.instructions["y"].operands == ("x", "x")
    assert body.instructions["y"].source == "jit(f)/while/body/mul"
    assert body.root.name == "t"
    runs = {i.name: times for _, i, times in module.executed()}
    assert runs["y"] == 10
    assert "while.3" not in runs


@pytest.mark.parametrize(
    ("dtype", "count"),
    [("bf16", 64), ("f32", 128), ("pred", 32), ("s4", 16), ("f8e4m3fn", 32), ("token", 0), ("u64", 256)],
)
def test_bytes_of_a_type(dtype, count):
    assert Shape(dtype, (4, 8)).bytes == count


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        Module.parse("module @jit_f {}")


@pytest.mark.parametrize("unroll", [False, True])
def test_flops_of_a_scan_are_those_of_all_its_runs(unroll):
    def forward(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, unroll=unroll)[0].sum()

    program = jax.jit(jax.grad(forward, argnums=1)).lower(jnp.ones((16, 32)), jnp.ones((6, 32, 32))).compile()
    found = operations(Module.parse(program.as_text()), Mesh({"data": 1}), EvenLoads(0.0))
    # Forward once, backward twice, of which the input's gradient is not asked for at the first layer; in a
    # loop it is computed there too.
    runs = 6 + 6 + (5 if unroll else 6)
    assert sum(o.times * o.flops for o in found) == pytest.approx(runs * 2 * 16 * 32 * 32)


def test_collectives_are_named_by_their_axes():
    mesh = jax.make_mesh((2, 4), ("data", "expert"), (jax.sharding.AxisType.Auto,) * 2)

    def step(x):
        def on_one(x):
            total = jax.lax.psum(x, "data")
            whole = jax.lax.all_gather(total, "expert", axis=0, tiled=True)
            return jax.lax.scan(
                lambda c, _: (jax.lax.ppermute(c, "expert", [(0, 1), (1, 2), (2, 3), (3, 0)]), None),
                whole,
                None,
                5,
            )[0]

        return jax.shard_map(
            on_one, mesh=mesh, in_specs=P(("data", "expert")), out_specs=P(None), check_vma=False
        )(x)

    x = jax.device_put(np.ones((64, 128), np.float32), NamedSharding(mesh, P(("data", "expert"))))
    found = operations(
        Module.parse(jax.jit(step).lower(x).compile().as_text()), Mesh(dict(mesh.shape)), EvenLoads(0.0)
    )
    sent = {(o.collective.kind, o.collective.axes): (o.times, o.collective) for o in found if o.collective}
    assert set(sent) == {
        ("all-reduce", ("data",)),
        ("all-gather", ("expert",)),
        ("collective-permute", ("expert",)),
    }
    times, total = sent["all-reduce", ("data",)]
    assert (times, total.payload, total.sent) == (1, 8 * 128 * 4, 8 * 128 * 4)
    times, gathered = sent["all-gather", ("expert",)]
    assert (times, gathered.payload, gathered.sent) == (1, 32 * 128 * 4, 24 * 128 * 4)
    times, passed = sent["collective-permute", ("expert",)]
    assert (times, passed.sent) == (5, 32 * 128 * 4)
