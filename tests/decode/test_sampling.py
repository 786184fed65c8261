"""Sampling, against sorting each row in float64."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe.decode import Sampling
from moe.decode.sampling import SamplingRows, kept, sample
from moe.errors import UserError
from moe.mesh import spec

VOCABULARY, ROWS = 23, 8


def by_sorting(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """Which tokens stay: the filters one after the other, each on what the one before left."""
    probability = np.exp(logits.astype(np.float64) - logits.max())
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    stay = np.ones(len(logits), bool)
    if how.top_k:
        stay &= logits >= logits[order[min(how.top_k, len(logits)) - 1]]
    if how.top_p < 1:
        left = np.where(stay, probability, 0.0) / probability[stay].sum()
        needed = int(np.searchsorted(np.cumsum(left[order]), how.top_p)) + 1
        stay &= logits >= logits[order[min(needed, stay.sum()) - 1]]
    return stay & (probability >= how.min_p * probability.max())


HOW = st.builds(
    Sampling,
    top_k=st.sampled_from([0, 1, 3, 22, 23, 99]),
    top_p=st.sampled_from([1.0, 0.93, 0.5, 0.111, 0.001]),
    min_p=st.sampled_from([0.0, 0.07, 0.6, 1.0]),
)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(HOW, min_size=ROWS, max_size=ROWS))
def test_filters_leave_what_sorting_leaves(seed, hows):
    logits = 3 * np.random.default_rng(seed).normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    found = np.asarray(jax.jit(kept)(logits, SamplingRows.of(hows)))
    np.testing.assert_array_equal(
        found, [by_sorting(row, how) for row, how in zip(logits, hows, strict=True)]
    )


def test_tokens_as_likely_as_the_last_that_stays_stay_too():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    by_count, by_mass = SamplingRows.of([Sampling(top_k=2)]), SamplingRows.of([Sampling(top_p=0.6)])
    for rows in (by_count, by_mass):
        np.testing.assert_array_equal(kept(logits, rows), [[True, True, True, True, False]])


def drawn(logits, rows: SamplingRows, number, vocabulary: int = VOCABULARY) -> np.ndarray:
    @jax.jit
    def run(logits, rows, number):
        return sample(*jax.sharding.reshard((logits, rows, number), spec("batch")), vocabulary)

    return np.asarray(run(logits, rows, number))


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 9},
        {"temperature": 1.7, "top_p": 0.8},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution_that_the_filters_leave(how, one_device):
    draws = 20_000
    logits = 1.5 * np.random.default_rng(3).normal(size=VOCABULARY).astype(np.float32)
    rows = SamplingRows.of([Sampling(**how, seed=seed) for seed in range(draws)])
    tokens = drawn(np.tile(logits, (draws, 1)), rows, np.arange(draws, dtype=np.int32) % 7)
    scaled = logits / how["temperature"]
    stay = by_sorting(scaled, Sampling(**how))
    probability = np.where(stay, np.exp(scaled.astype(np.float64)), 0.0)
    expected = draws * probability / probability.sum()
    count = np.bincount(tokens, minlength=VOCABULARY)
    assert not count[~stay].any()
    assert stats.chisquare(count[stay], expected[stay]).pvalue > 1e-3


def test_a_row_is_drawn_by_its_own_seed_and_number_alone(one_device):
    random = np.random.default_rng(0)
    logits = random.normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    hows = [Sampling(seed=seed, top_k=seed % 3) for seed in range(ROWS)]
    number = np.arange(ROWS, dtype=np.int32)
    tokens = drawn(logits, SamplingRows.of(hows), number)
    order = random.permutation(ROWS)
    shuffled = drawn(logits[order], SamplingRows.of([hows[i] for i in order]), number[order])
    np.testing.assert_array_equal(shuffled, tokens[order])
    alike, same = np.tile(logits[:1], (64, 1)), SamplingRows.of([Sampling(seed=5)] * 64)
    assert len(set(drawn(alike, same, np.zeros(64, np.int32)))) == 1
    assert len(set(drawn(alike, same, np.arange(64, dtype=np.int32)))) > 5
    other = SamplingRows.of([Sampling(seed=seed) for seed in range(64)])
    assert len(set(drawn(alike, other, np.zeros(64, np.int32)))) > 5


@pytest.mark.parametrize("mesh", ["1x1", "4x2"], indirect=True)
def test_greedy_and_drawn_rows_side_by_side(mesh):
    logits = np.random.default_rng(1).normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    hows = [Sampling(temperature=0.0 if row % 2 else 5.0, seed=row) for row in range(ROWS)]
    tokens = drawn(logits, SamplingRows.of(hows), np.zeros(ROWS, np.int32))
    np.testing.assert_array_equal(tokens[1::2], logits[1::2].argmax(-1))
    assert (tokens[::2] != logits[::2].argmax(-1)).any()


def test_entries_behind_the_vocabulary_are_never_drawn(one_device):
    logits = np.where(np.arange(VOCABULARY) < 10, 0.0, 50.0).astype(np.float32)
    rows = SamplingRows.of([Sampling(temperature=row % 2, seed=row) for row in range(64)])
    assert drawn(np.tile(logits, (64, 1)), rows, np.zeros(64, np.int32), vocabulary=10).max() < 10


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {"temperature": -0.1},
            {"temperature": float("nan")},
            {"top_k": -1},
            {"top_p": 0.0},
            {"top_p": 1.1},
        ),
        *({"min_p": -0.1}, {"min_p": 2.0}, {"seed": -1}, {"seed": 2**32}),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"^{name}="):
        Sampling(**{**asdict(Sampling()), **wrong})


def test_infinite_logits_do_no_harm(one_device):
    logits = jnp.full((1, 5), -jnp.inf).at[0, 3].set(1.0)
    rows = SamplingRows.of([Sampling(top_k=4, top_p=0.5, min_p=0.1)])
    assert drawn(np.asarray(logits), rows, np.zeros(1, np.int32), 5) == [3]
