"""On a CUDA GPU from Ampere on: `JAX_PLATFORMS=cuda uv run --extra gpu pytest -m gpu tests/accelerators`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe.kernels import Groups, rows_needed
from moe.kernels.grouped_matmul_triton import present, product, transpose_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not present(), reason="no GPU that the kernels compile for"),
]
EXPERTS, ASSIGNMENTS, TILE = 8, 3000, 128
ROWS = rows_needed(ASSIGNMENTS, EXPERTS, TILE)
WIDTHS = [(256, 192), (272, 200)]  # whole blocks, and not
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}  # TF32 in the last

sizes = st.lists(st.integers(0, ASSIGNMENTS // 2), min_size=EXPERTS, max_size=EXPERTS).filter(
    lambda sizes: sum(sizes) <= ASSIGNMENTS
)


@partial(jax.jit, static_argnames="precision")
def all_three(rows, w, cotangent, group_sizes, precision=None):
    groups = Groups(group_sizes, TILE)
    with jax.default_matmul_precision(precision):
        products = product(rows, w, groups), product(cotangent, w, groups, transposed=True)
        return *products, transpose_product(rows, cotangent, groups)


def poison():
    """Leave memory full of NaN, so that what a kernel does not write shows."""
    jax.block_until_ready(jnp.full((64, 1024, 1024), jnp.nan))


def make(group_sizes, depth, width, dtype, seed):
    random, places, first = np.random.default_rng(seed), [], 0
    rows, cotangent = random.normal(size=(ROWS, depth)), np.zeros((ROWS, width))
    for size in group_sizes:
        places.append(slice(first, first + size))
        cotangent[places[-1]] = random.normal(size=(size, width))
        first += -(-size // TILE) * TILE
    w = random.normal(size=(EXPERTS, depth, width))
    return [jnp.asarray(a, dtype) for a in (rows, w, cotangent)], places, first


def distance(x, reference) -> float:
    """||x - reference|| / ||reference||; NaN never passes."""
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def check(group_sizes, depth, width, dtype, seed, tolerance, precision=None):
    arrays, places, end = make(group_sizes, depth, width, dtype, seed)
    poison()
    results = all_three(*arrays, np.array(group_sizes, np.int32), precision)
    # On the host, where a slice of every length needs no program of its own.
    rows, w, cotangent, y, rows_bar, w_bar = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in (*arrays, *results)
    )
    for e, mine in enumerate(places):
        if group_sizes[e] == 0:
            assert not w_bar[e].any()
            continue
        assert distance(y[mine], rows[mine] @ w[e]) < tolerance
        assert distance(rows_bar[mine], cotangent[mine] @ w[e].T) < tolerance
        assert distance(w_bar[e], rows[mine].T @ cotangent[mine]) < tolerance
    assert not y[end:].any()
    assert not rows_bar[end:].any()
    assert np.isfinite(y).all()


@pytest.mark.parametrize(("depth", "width"), WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(sizes, st.integers(0, 2**16))
@example([0] * EXPERTS, 0)
@example([0] * (EXPERTS - 1) + [ASSIGNMENTS], 0)
@example([ASSIGNMENTS] + [0] * (EXPERTS - 1), 0)
@example([1] * EXPERTS, 0)
@settings(max_examples=20)
def test_products_of_any_groups(dtype, depth, width, group_sizes, seed):
    check(group_sizes, depth, width, dtype, seed, TOLERANCE[dtype])


def test_full_float32_where_it_is_asked_for():
    check([700, 0, 3, 128, 129, 1000, 0, 1], *WIDTHS[1], "float32", 0, 1e-5, precision="highest")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_repeated_runs_are_identical(dtype):
    group_sizes = np.array([700, 0, 3, 128, 129, 1000, 0, 1], np.int32)
    arrays, _, _ = make(group_sizes, *WIDTHS[0], dtype, 0)
    first = all_three(*arrays, group_sizes)
    for _ in range(3):
        poison()
        for a, b in zip(first, all_three(*arrays, group_sizes), strict=True):
            assert (a == b).all()
