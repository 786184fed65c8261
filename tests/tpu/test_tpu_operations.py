"""What operations cost, from lines as XLA's TPU compiler prints them (shapes are those of OLMoE's step)."""

import pytest

from tpu.chips import CHIPS, Place
from tpu.collectives import Mesh
from tpu.estimate import times
from tpu.hlo import Module
from tpu.operations import EvenLoads, Operation, operations

MESH = Mesh({"data": 1, "expert": 4})


def found(
    *lines: str, computations: str = "", rows: float = 0.0, touched: float = 1.0
) -> dict[str, Operation]:
    """Operations of an ENTRY of these lines."""
    module = program(*lines, computations=computations)
    return {o.name: o for o in operations(module, MESH, EvenLoads(rows, touched))}


def program(*lines: str, computations: str = "") -> Module:
    *first, last = lines
    text = "\n".join([f"  {line}" for line in first] + [f"  ROOT {last}"])
    return Module.parse(f"{computations}\nENTRY %main (x: f32[1]) -> f32[1] {{\n{text}\n}}\n")


def test_a_product_of_matrices():
    ops = found(
        "%a = bf16[8192,2048]{1,0} parameter(0)",
        "%b = bf16[2048,1024]{1,0} parameter(1)",
        "%c = bf16[8192,1024]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf",
    )
    assert ops["c"].kind == "matrix"
    assert ops["c"].flops == 2 * 8192 * 2048 * 1024
    assert ops["c"].bytes == 2 * (8192 * 2048 + 2048 * 1024 + 8192 * 1024)


def test_a_product_too_thin_for_the_matrix_units_counts_too():
    scores = 'metadata={op_name="jit(step)/shard_map/bgrh,bgsh->bgrs/dot_general"}'
    ops = found(
        "%qk = f32[8,16,4096,128]{3,2,1,0} parameter(0)",
        "%zero = f32[] constant(0)",
        f"%scores = f32[8,16,4096]{{2,1,0}} reduce(%qk, %zero), dimensions={{3}}, to_apply=%add, {scores}",
        "%sum = f32[8,16]{1,0} reduce(%scores, %zero), dimensions={2}, to_apply=%add",
    )
    assert ops["scores"].flops == 2 * 8 * 16 * 4096 * 128
    assert ops["sum"].flops == 0


def test_a_scatter_moves_what_it_puts():
    ops = found(
        "%cache = bf16[8,16,4096,128]{3,2,1,0} parameter(0)",
        "%places = s32[128,3]{1,0} parameter(1)",
        "%new = bf16[128,128]{1,0} parameter(2)",
        "%put = bf16[8,16,4096,128]{3,2,1,0} scatter(%cache, %places, %new), to_apply=%second",
    )
    assert ops["put"].bytes == 2 * 2 * 128 * 128


@pytest.mark.parametrize(
    ("window", "labels", "shapes", "flops"),
    [
        # A batch of products as two dilated dimensions of a window: scores of 2 x 16 heads.
        (
            "size=2x16 stride=1x15 lhs_dilate=2x16",
            "0b1f_0o1i->01bf",
            ("f32[2,16,4096,4096]", "bf16[2,4096,16,128]", "bf16[2,4096,16,128]"),
            2 * 2 * 16 * 4096 * 4096 * 128,
        ),
        # The same turned round and padded, as a gradient has it.
        (
            "size=2x16 stride=2x16 pad=1_1x15_15 lhs_dilate=1x15 rhs_reversal=1x1",
            "0b1f_01io->01fb",
            ("bf16[2,16,128,4096]", "bf16[2,4096,16,64]", "bf16[2,16,64,128]"),
            2 * 2 * 16 * 4096 * 64 * 128,
        ),
        (
            "size=1",
            "0bf_io0->0bf",
            ("f32[2,4096,64]", "f32[2,4096,2048]", "f32[2048,64,1]"),
            2 * 2 * 4096 * 2048 * 64,
        ),
        (
            "size=2",
            "0fb_0io->bf0",
            ("f32[64,2048,1]", "f32[2,4096,64]", "f32[2,4096,2048]"),
            2 * 2 * 4096 * 2048 * 64,
        ),
    ],
)
def test_products_that_are_written_as_convolutions(window, labels, shapes, flops):
    out, left, right = shapes
    ops = found(
        f"%a = {left}{{0}} parameter(0)",
        f"%b = {right}{{0}} parameter(1)",
        f"%c = {out}{{0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}",
    )
    assert ops["c"].flops == flops


GROUPED = (
    "%sizes = s32[17]{0} parameter(0)",
    "%rows = bf16[264192,2048]{1,0} parameter(1)",
    "%w = bf16[16,2048,1024]{2,1,0} parameter(2)",
)


def test_a_grouped_product_costs_the_rows_of_balanced_experts_not_its_buffer():
    call = "%ragged-dot-none.1 = bf16[264192,1024]{1,0} custom-call(%sizes, %rows, %w)"
    op = found(*GROUPED, call, rows=65536)["ragged-dot-none.1"]
    assert op.kind == "experts"
    assert op.flops == 2 * 65536 * 2048 * 1024
    assert op.bytes == pytest.approx(2 * (65536 * 2048 + 65536 * 1024 + 16 * 2048 * 1024) + 17 * 4)


def test_a_grouped_product_reads_the_matrices_of_experts_in_use_only():
    call = "%ragged-dot-none.1 = bf16[264192,1024]{1,0} custom-call(%sizes, %rows, %w)"
    op = found(*GROUPED, call, rows=64, touched=0.25)["ragged-dot-none.1"]
    assert op.bytes == pytest.approx(2 * (64 * 2048 + 64 * 1024 + 4 * 2048 * 1024) + 17 * 4)


def test_a_weight_gradient_costs_as_much_as_the_product():
    call = "%ragged-dot-none = bf16[16,2048,1024]{2,1,0} custom-call(%sizes, %rows, %out)"
    op = found(*GROUPED, "%out = bf16[264192,1024]{1,0} parameter(3)", call, rows=65536)["ragged-dot-none"]
    assert op.flops == 2 * 65536 * 2048 * 1024


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "products"), [("fwd_residuals", 2), ("dkv_no_residuals", 4), ("dq_no_residuals", 3)]
)
def test_attention_leaves_out_the_blocks_ahead(kernel, products, batch):
    q = "bf16[2,16,4096,128]" if batch == 2 else "bf16[16,4096,128]"
    name = f"splash_mha_{kernel}.1"
    op = found(
        "%mask = s8[1,4,4]{2,1,0} parameter(0)",
        f"%q = {q}{{2,1,0}} parameter(1)",
        f'%{name} = {q}{{2,1,0}} custom-call(%mask, %q, %q, %q), custom_call_target="tpu_custom_call"',
    )[name]
    assert op.kind == "attention"
    assert op.flops == products * 2 * batch * 16 * 128 * 10 * 1024**2


SLICED = """%fused (p.0: f32[64,1024], p.1: s32[]) -> f32[1,1024] {
  %p.0 = f32[64,1024]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %taken = f32[1,1024]{1,0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,1024}
}

%put (q.0: f32[64,1024], q.1: f32[1,1024], q.2: s32[]) -> f32[64,1024] {
  %q.0 = f32[64,1024]{1,0} parameter(0)
  %q.1 = f32[1,1024]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %updated = f32[64,1024]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2)
}
"""


def test_bytes_are_those_that_move():
    ops = found(
        "%stack = f32[64,1024]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%one = f32[1,1024]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused",
        "%near = f32[1,1024]{1,0:T(1,128)S(1)} copy(%one)",
        "%begun = ((f32[64,1024]{1,0}), f32[8,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack)",
        "%there = f32[8,1024]{1,0:T(8,128)S(1)} slice-done(%begun)",
        "%back = f32[64,1024]{1,0} fusion(%stack, %one, %i), kind=kLoop, calls=%put",
        computations=SLICED,
    )
    assert ops["one"].bytes == 2 * 4096 + 4  # a slice of the stack, and the index
    assert ops["near"].bytes == 4096  # what stays in VMEM costs nothing
    assert ops["begun"].bytes == 8 * 4096
    assert ops["there"].bytes == 0
    assert ops["back"].bytes == 2 * 4096 + 4  # in place


def test_time_goes_along_the_schedule():
    chip = CHIPS["v6e"]
    cycles = 'backend_config={"estimated_cycles":"700000"}'
    lines = (
        "%a = bf16[4096,4096]{1,0} parameter(0)",
        "%begun = (bf16[4096,4096], bf16[16384,4096]) all-gather-start(%a), replica_groups=[1,4]<=[4]",
        f"%b = bf16[4096,4096]{{1,0}} convolution(%a, %a), dim_labels=bf_io->bf, {cycles}",
        "%ended = bf16[16384,4096]{1,0} all-gather-done(%begun)",
        "%c = bf16[4096,4096]{1,0} all-reduce(%b), replica_groups=[1,4]<=[4]",
    )
    module = program(*lines)
    estimate = times(
        module, operations(module, MESH, EvenLoads(0.0)), chip, [Place((i, 0)) for i in range(4)]
    )
    product, payload = 2 * 4096**3 / chip.peak_flops, 4096 * 4096 * 2
    gather = 4 * payload * 3 / 4 / chip.link_bandwidth
    reduce = 2 * payload * 3 / 4 / chip.link_bandwidth
    assert estimate.matrix == pytest.approx(product)
    assert estimate.ici == pytest.approx(gather + reduce)
    assert gather > product
    assert estimate.roofline == pytest.approx(gather + reduce)
    assert estimate.exposed == pytest.approx(gather + reduce - product)
    assert estimate.compiler == pytest.approx(max(gather, 700_000 / chip.clock) + reduce)
    assert estimate.bound == "ICI"
