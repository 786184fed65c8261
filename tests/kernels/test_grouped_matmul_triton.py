"""The portable GPU kernels, interpreted on the CPU, against one product a group in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.sharding import get_mesh
from other_platform import traced_for

from moe.kernels import Groups, rows_needed
from moe.kernels.grouped_matmul_triton import Blocks, fits, product, transpose_product
from moe.mesh import AXES

EXPERTS, ASSIGNMENTS = 4, 48
DEPTH, WIDTH = 40, 72  # neither a whole number of blocks
BLOCKS = Blocks(rows=16, columns=32, depth_bytes=64)
TILES = [16, 48]  # one block of rows a tile, and three
CARDS = ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"]
GARBAGE = 100.0  # its sums are finite in float16 too

sizes = st.lists(st.integers(0, ASSIGNMENTS // 2), min_size=EXPERTS, max_size=EXPERTS).filter(
    lambda sizes: sum(sizes) <= ASSIGNMENTS
)


def make(group_sizes, tile, seed, dtype=np.float32):
    """Rows with garbage in the padding, matrices, cotangents with zeros there; each group, and the end."""
    random = np.random.default_rng(seed)
    count, places, first = rows_needed(ASSIGNMENTS, EXPERTS, tile), [], 0
    rows = np.full((count, DEPTH), GARBAGE)
    cotangent = np.zeros((count, WIDTH))
    for size in group_sizes:
        places.append(slice(first, first + size))
        rows[places[-1]] = random.normal(size=(size, DEPTH))
        cotangent[places[-1]] = random.normal(size=(size, WIDTH))
        first += -(-size // tile) * tile
    w = random.normal(size=(EXPERTS, DEPTH, WIDTH))
    return *(jnp.asarray(a, dtype) for a in (rows, w, cotangent)), places, first


@partial(jax.jit, static_argnums=0)
def all_three(tile, rows, w, cotangent, group_sizes):
    """Product, product with the transposed matrices, gradient of the matrices."""
    groups = Groups(group_sizes, tile)
    how = {"blocks": BLOCKS, "interpret": True}
    return (
        product(rows, w, groups, **how),
        product(cotangent, w, groups, transposed=True, **how),
        transpose_product(rows, cotangent, groups, **how),
    )


def check(group_sizes, tile, seed, dtype, tolerance):
    rows, w, cotangent, places, end = make(group_sizes, tile, seed, dtype)
    y, rows_bar, w_bar = all_three(tile, rows, w, cotangent, np.array(group_sizes, np.int32))
    assert y.dtype == rows_bar.dtype == w_bar.dtype == dtype
    wide_rows, wide_w, wide_cotangent = (np.asarray(a, np.float64) for a in (rows, w, cotangent))
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance * DEPTH**0.5)
    for e, mine in enumerate(places):
        close(np.asarray(y[mine], np.float64), wide_rows[mine] @ wide_w[e])
        close(np.asarray(rows_bar[mine], np.float64), wide_cotangent[mine] @ wide_w[e].T)
        close(np.asarray(w_bar[e], np.float64), wide_rows[mine].T @ wide_cotangent[mine])
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(y[end:], 0)
    np.testing.assert_array_equal(rows_bar[end:], 0)


@pytest.mark.parametrize("tile", TILES)
@given(sizes, st.integers(0, 2**16))
@example([0, 0, 0, 0], 0)
@example([0, 0, 0, ASSIGNMENTS], 0)
@example([ASSIGNMENTS, 0, 0, 0], 0)
@example([1, 1, 1, 1], 0)
@settings(max_examples=20)
def test_products_of_any_groups(tile, group_sizes, seed):
    check(group_sizes, tile, seed, jnp.float32, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)])
def test_half_precision(dtype, tolerance):
    check([20, 0, 16, 5], 16, 0, dtype, tolerance)


def test_half_precision_is_summed_in_float32():
    """The gradient sums 512 ones: bfloat16 would stop at 256."""
    rows = jnp.ones((512, 16), jnp.bfloat16)
    w_bar = transpose_product(rows, rows, Groups(jnp.array([0, 512]), tile=16), interpret=True)
    np.testing.assert_array_equal(w_bar[1].astype(np.float32), np.full((16, 16), 512))


@pytest.mark.parametrize("mesh", ["4x2"], indirect=True)
def test_results_vary_over_the_mesh_as_their_inputs_do(mesh):
    """`jax.shard_map` refuses results that say nothing of it, and those that say they are all the same."""
    arrays = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, DEPTH), (EXPERTS, DEPTH, WIDTH), (64, WIDTH))
    ]
    sizes = jax.ShapeDtypeStruct((8, EXPERTS), jnp.int32, sharding=jax.NamedSharding(get_mesh(), P(AXES)))

    @partial(jax.shard_map, in_specs=(P(), P(), P(), P(AXES)), out_specs=P(AXES))
    def by_device(rows, w, cotangent, sizes):
        groups = Groups(sizes[0], 16)
        products = product(rows, w, groups), product(cotangent, w, groups, transposed=True)
        return *products, transpose_product(rows, cotangent, groups)

    y, rows_bar, w_bar = jax.jit(by_device).trace(*arrays, sizes).out_info
    assert (y.shape, rows_bar.shape) == ((8 * 64, WIDTH), (8 * 64, DEPTH))
    assert w_bar.shape == (8 * EXPERTS, DEPTH, WIDTH)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("dtype", "width"), [(jnp.bfloat16, 1024), (jnp.float32, 1000)])
def test_lowers_for_cards_that_are_not_here(card, dtype, width):
    def run(rows, w, cotangent, group_sizes):
        groups = Groups(group_sizes, 128)
        products = product(rows, w, groups), product(cotangent, w, groups, transposed=True)
        return *products, transpose_product(rows, cotangent, groups)

    shapes = [(1024, 2048), (8, 2048, width), (1024, width)]
    arrays = [*(jax.ShapeDtypeStruct(s, dtype) for s in shapes), jax.ShapeDtypeStruct((8,), jnp.int32)]
    with traced_for(card):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("grouped_product") >= 2
    assert "grouped_transpose_product" in text


def test_what_fits():
    """Any card from Ampere on, one type of numbers, tiles of whole blocks."""

    def on(card, *dtypes, tile=48, uniform=False):
        groups, operands = Groups(jnp.array([1]), tile, uniform), [jnp.zeros((48, 7), d) for d in dtypes]
        with traced_for(card):
            return fits(groups, *operands)

    assert all(on(card, *2 * [dtype]) for card in CARDS for dtype in ("bfloat16", "float16", "float32"))
    assert not any(on(card, "float32") for card in ("Tesla T4", "Tesla V100-SXM2-16GB", "gfx942"))
    assert not on(CARDS[0], "float32", "bfloat16")
    assert not on(CARDS[0], "float32", tile=24)
    assert not on(CARDS[0], "float32", uniform=True)
    assert not fits(Groups(jnp.array([1]), 48), jnp.zeros((48, 7)))  # no card at all
