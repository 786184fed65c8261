"""On a Hopper GPU: products of few rows and of int8 rows, against float64 with the same rounded numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe.kernels import Groups, hopper, rows_needed
from moe.kernels.hopper.int8_products import int8_product, int8_swiglu
from moe.kernels.hopper.target import present

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not present(), reason="no Hopper GPU")]

EXPERTS, ASSIGNMENTS, WIDTH, HIDDEN, TOKENS = 12, 80, 512, 384, 40
SHAPES = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3}  # of the largest number, two roundings at most

# Of each assignment its expert, or none; as loads.
sizes = st.lists(st.integers(0, EXPERTS), max_size=ASSIGNMENTS).map(
    lambda expert: np.bincount(expert, minlength=EXPERTS + 1)[:EXPERTS].tolist()
)
examples = [
    example([0] * EXPERTS, 0),
    example([0] * (EXPERTS - 1) + [ASSIGNMENTS], 0),
    example([1] * EXPERTS, 0),
]


def with_examples(test):
    for add in examples:
        test = add(test)
    return given(sizes, st.integers(0, 2**16))(test)


def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def int8(w):
    """[E, F, D] of int8 and the scale of each column."""
    scale = np.abs(w).max(axis=1) / 127
    return np.round(w / scale[:, None]).astype(np.int8).swapaxes(1, 2), scale.astype(np.float32)


def drawn(group_sizes, tile, seed):
    """Matrices, rows with large numbers where nobody may read, and the rows of each expert."""
    random, places, first = np.random.default_rng(seed), [], 0
    weights = {
        name: random.normal(size=(EXPERTS, *shape)) / shape[0] ** 0.5 for name, shape in SHAPES.items()
    }
    rows = np.full((rows_needed(ASSIGNMENTS, EXPERTS, tile), WIDTH), 100.0)
    for size in group_sizes:
        places.append(slice(first, first + size))
        rows[places[-1]] = random.normal(size=(size, WIDTH))
        first += -(-size // tile) * tile
    return weights, rows, places


def check(found, rows, weights, places, tolerance):
    found = np.asarray(found.astype(jnp.float32), np.float64)
    for e, mine in enumerate(places):
        if mine.start == mine.stop:
            continue
        expected = swiglu(rows[mine] @ weights["gate"][e], rows[mine] @ weights["up"][e])
        if "down" in weights:
            expected = expected @ weights["down"][e]
        assert np.abs(found[mine] - expected).max() < tolerance * np.abs(expected).max()


def rounded(a, dtype):
    """As the kernel gets it, and the same numbers in float64."""
    given = jnp.asarray(a, dtype)
    return given, np.asarray(given.astype(jnp.float32), np.float64)


@partial(jax.jit, static_argnames="tile")
def few_rows(rows, matrices, scales, group_sizes, *, tile):
    groups = Groups(group_sizes, tile)
    hidden = hopper.few_rows_swiglu(rows, matrices[0], matrices[1], groups, scales=scales[:2])
    return hopper.few_rows_product(hidden, matrices[2], groups, scale=scales[2])


@pytest.mark.parametrize("tile", [8, 16, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@settings(max_examples=8)
@with_examples
def test_few_rows(dtype, tile, group_sizes, seed):
    weights, rows, places = drawn(group_sizes, tile, seed)
    x_dtype = "bfloat16" if dtype == "int8" else dtype
    given_rows, rows = rounded(rows, x_dtype)
    matrices, scales = [], []
    for name, w in weights.items():
        if dtype == "int8":
            numbers, scale = int8(w)
            weights[name] = numbers.swapaxes(1, 2) * scale[:, None].astype(np.float64)
            matrices.append(jnp.asarray(numbers))
            scales.append(jnp.asarray(scale))
        else:
            matrix, weights[name] = rounded(w, dtype)
            matrices.append(matrix)
            scales.append(None)
    arguments = (given_rows, matrices, scales, np.array(group_sizes, np.int32))
    found = few_rows(*arguments, tile=tile)
    check(found, rows, weights, places, 2 * TOLERANCE[x_dtype])
    again = few_rows(*arguments, tile=tile)
    for mine in places:  # rows between groups are nobody's and stay unwritten
        assert jnp.array_equal(found[mine], again[mine])


@jax.jit
def all_int8(x, x_scale, token, matrices, scales, group_sizes):
    groups = Groups(group_sizes, 128)
    hidden = int8_swiglu(x, x_scale[token], matrices[0], matrices[1], scales[:2], groups, token=token)
    step = jnp.max(jnp.abs(hidden.astype(jnp.float32)), axis=1) / 127
    numbers = jnp.round(hidden.astype(jnp.float32) / step[:, None]).astype(jnp.int8)
    return hidden, numbers, step, int8_product(numbers, step, matrices[2], scales[2], groups)


@settings(max_examples=8)
@with_examples
def test_int8_rows(group_sizes, seed):
    """Integers are summed exactly, so that only the result is rounded."""
    weights, rows, places = drawn(group_sizes, 128, seed)
    random = np.random.default_rng(seed)
    x = random.integers(-127, 128, (TOKENS, WIDTH), np.int8)
    x_scale = random.uniform(0.005, 0.02, TOKENS).astype(np.float32)
    token = random.integers(0, TOKENS, len(rows))
    matrices, scales = zip(*(int8(w) for w in weights.values()), strict=True)
    hidden, numbers, step, y = all_int8(x, x_scale, token, matrices, scales, np.array(group_sizes, np.int32))
    gate, up, down = (
        m.swapaxes(1, 2) * s[:, None].astype(np.float64) for m, s in zip(matrices, scales, strict=True)
    )
    real = x.astype(np.float64) * x_scale[:, None]
    check(hidden, real[token], {"gate": gate, "up": up}, places, TOLERANCE["bfloat16"])
    y, numbers = (np.asarray(a.astype(jnp.float32), np.float64) for a in (y, numbers))
    for e, mine in enumerate(places):
        if mine.start < mine.stop:
            expected = numbers[mine] * np.asarray(step, np.float64)[mine, None] @ down[e]
            assert np.abs(y[mine] - expected).max() < TOLERANCE["bfloat16"] * np.abs(expected).max()
