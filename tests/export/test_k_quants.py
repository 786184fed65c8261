"""K-quants against the dequantisation of the gguf package, and against what is known of their error."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from moe.export.k_quants import encode

BITS = {Kind.Q4_K: 4, Kind.Q5_K: 5, Kind.Q6_K: 6}
# Relative error on normal numbers, which llama.cpp's own quantiser has within a hundredth too.
ERROR = {Kind.Q4_K: 0.0718, Kind.Q5_K: 0.0360, Kind.Q6_K: 0.0178}


def there_and_back(x: np.ndarray, kind: Kind) -> np.ndarray:
    return quants.dequantize(encode(x, kind), kind)


@pytest.mark.parametrize("kind", ERROR)
def test_error_on_normal_numbers(kind):
    x = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    error = np.sqrt(np.square(there_and_back(x, kind) - x).mean())
    assert error == pytest.approx(ERROR[kind], rel=0.01)


@pytest.mark.parametrize("kind", ERROR)
def test_no_number_is_off_by_more_than_a_step(kind):
    x = np.random.default_rng(1).uniform(-3.0, 5.0, (64, 256)).astype(np.float32)
    # Scales have six bits (Q6_K: eight) of the largest, so a step is a little more than range over codes.
    step = 8.0 / (2 ** BITS[kind] - 1) if kind != Kind.Q6_K else 5.0 / 31
    assert np.abs(there_and_back(x, kind) - x).max() < 1.1 * step


@pytest.mark.parametrize("kind", ERROR)
def test_numbers_on_a_grid_stay(kind):
    codes = np.random.default_rng(2).integers(0, 2 ** BITS[kind], (8, 8, 32)) - (
        32 if kind == Kind.Q6_K else 0
    )
    # Every block shows all of its range, on both of Q6_K's grids of 16.
    codes[..., [0, 16]] = codes.min()
    codes[..., [1, 17]] = codes.max()
    x = (codes * 0.25).astype(np.float32).reshape(8, 256)
    np.testing.assert_allclose(there_and_back(x, kind), x, atol=2e-3 * np.abs(x).max())


@pytest.mark.parametrize("kind", ERROR)
def test_blocks_of_one_number(kind):
    x = np.repeat(np.array([0.0, 0.5, -0.5], np.float32)[:, None], 256, axis=1)
    np.testing.assert_allclose(there_and_back(x, kind), x, atol=5e-3)


@pytest.mark.parametrize("kind", ERROR)
def test_rows_of_any_number_of_axes(kind):
    x = np.random.default_rng(3).standard_normal((2, 3, 512)).astype(np.float32)
    whole = encode(x, kind)
    assert whole.shape[:2] == (2, 3)
    np.testing.assert_array_equal(whole[1, 2], encode(x[1, 2], kind))
