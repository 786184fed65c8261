"""How the Hopper kernels are cut: by the nearest measured shape or by a rule, always so that it fits."""

import importlib
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels import Groups, hopper
from moe.kernels.hopper import Tiles, tiling
from moe.kernels.hopper.tiling import Case, Measured, tiles_for
from moe.kernels.hopper.works import LayerShape, Work, draw, works

KERNELS = (
    "product",
    "inward_transposed",
    "swiglu_product",
    "swiglu_backward",
    "weight_gradient",
    "weight_gradient, gathered columns",
)
widths = st.integers(1, 128).map(lambda n: 128 * n)
cases = st.builds(
    Case, st.sampled_from(KERNELS), widths, widths, st.integers(1, 512), st.sampled_from([64, 128, 192, 256])
)


@given(cases)
def test_the_rule_and_all_that_is_tried_fit(case):
    work = Work(case, 0, lambda inputs, tiles: None)
    assert case.takes(case.rule())
    assert work.forms()[0] == case.rule()
    for tiles in work.forms():
        assert all(case.takes(other) for other in work.orders(tiles))
        assert tiling.shared_memory(tiles) <= 227 * 1024
        assert not case.takes(
            Tiles(tiles.rows, tiles.columns, 1 + tiling.most_stages(tiles.rows, tiles.columns))
        )


def test_all_that_is_tried_lowers():
    """Every form but those that differ in depth alone, and the rule's, which are lowered elsewhere."""
    shape = LayerShape(tokens=32, width=256, hidden=256, experts=2, per_token=2)
    inputs = jax.eval_shape(lambda: draw(shape, 128))
    for work in {work.case.kernel: work for work in works(shape, 128)}.values():
        forms = {(tiles.rows, tiles.columns): tiles for tiles in work.forms()}
        forms.pop((work.case.rule().rows, work.case.rule().columns))
        for tiles in forms.values():
            traced = jax.jit(lambda inputs, work=work, tiles=tiles: work.run(inputs, tiles)).trace(inputs)
            traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("tiles", [Tiles(), Tiles(256, 128, stages=3), Tiles(128, 64, stages=5)])
@pytest.mark.parametrize("kernel", ["rows_kernel", "weight_gradient"])
def test_shared_memory_is_what_the_kernels_allocate(monkeypatch, kernel, tiles):
    allocated = []

    def launch(body, inputs, out_type, scratch, name):
        for piece in scratch:
            if isinstance(piece, plgpu.Barrier):
                allocated.append(8 * math.prod(piece.num_barriers))
            else:
                allocated.append(jnp.dtype(piece.dtype).itemsize * math.prod(piece.shape))
        return out_type

    monkeypatch.setattr(importlib.import_module(f"moe.kernels.hopper.{kernel}"), "launch", launch)
    groups, rows = Groups(jnp.array([3, 4]), tile=256), jnp.zeros((512, 128), jnp.bfloat16)
    if kernel == "rows_kernel":
        hopper.product(rows, jnp.zeros((2, 128, 256), jnp.bfloat16), groups, tiles=tiles)
    else:
        hopper.weight_gradient(rows, rows, groups, tiles=tiles)
    assert sum(allocated) == tiling.shared_memory(tiles)


GROUPS = Groups(jnp.zeros(64, jnp.int32), tile=128)
BEST = Tiles(128, 128, stages=5, strip=16)


def measured(kernel="product", depth=1024, width=2048, experts=64, tile=128, tiles=BEST):
    return Measured(Case(kernel, depth, width, experts, tile), tiles, ms=1.25, rule_ms=1.5)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes the table of an invented H100."""
    monkeypatch.setattr(tiling, "TABLES", tmp_path)
    monkeypatch.setattr(tiling, "present_chip", lambda: "H100")
    forget = (tiling.read.cache_clear, tiling._hint.cache_clear)

    def write(*lines):
        (tmp_path / "h100.json").write_text(tiling.to_json(list(lines), {"card": "invented"}))

    for clear in forget:
        clear()
    yield write
    for clear in forget:
        clear()


def test_the_nearest_measured_shape_decides(table):
    nearer = Tiles(128, 256, stages=3, strip=1)
    table(measured(), measured(depth=2048, tiles=nearer), measured("inward_transposed"))
    assert tiles_for("product", GROUPS, 1024, 2048) == BEST
    assert tiles_for("product", GROUPS, 1280, 1536) == BEST
    assert tiles_for("product", GROUPS, 1792, 2048) == nearer


@pytest.mark.parametrize(
    "line",
    [
        measured("inward_transposed"),
        measured(tile=64, tiles=Tiles(64, 128)),
        measured(depth=64 * 1024),
        measured(tiles=Tiles(stages=9)),
    ],
    ids=["another kernel", "another tile", "far away", "does not fit"],
)
def test_what_was_measured_for_something_else_does_not_count(table, line):
    table(line)
    assert tiles_for("product", GROUPS, 1024, 2048) == Case("product", 1024, 2048, 64, 128).rule()


def test_tiles_that_do_not_divide_the_width_are_passed_over(table):
    table(measured("swiglu_backward", width=512, tiles=Tiles(strip=2)))
    assert tiles_for("swiglu_backward", GROUPS, 1024, 512).columns == 256
    assert tiles_for("swiglu_backward", GROUPS, 1024, 640).columns == 128


def test_a_chip_without_a_table_takes_the_rule_and_says_so_once(table, capsys):
    for _ in range(2):
        assert tiles_for("product", GROUPS, 1024, 2048) == Tiles()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "python -m moe.kernels.tune" in message


def test_without_a_hopper_chip_nothing_is_said(capsys):
    assert tiling.present_chip() is None
    assert tiles_for("product", GROUPS, 1024, 2048) == Tiles()
    assert capsys.readouterr().err == ""


def test_the_tables_of_the_project_hold_what_fits():
    for file in tiling.TABLES.glob("*.json"):
        lines = tiling.from_json(file.read_text())
        assert lines, file
        assert len({line.case for line in lines}) == len(lines), file
        assert all(line.case.takes(line.tiles) and 0 < line.ms <= line.rule_ms for line in lines), file


def test_tables_are_read_as_written():
    lines = [measured(), measured("swiglu_backward")]
    text = tiling.to_json(lines, {"card": "invented", "jax": "0"})
    assert tiling.from_json(text) == lines
    assert len(text.splitlines()) == 8
