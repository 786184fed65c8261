"""The rule by which a slice is said to suffer more than the rest."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from moe.compress.compare import Answers
from moe.compress.worse_slices import p_larger, worse_slices


def answers(seed, increase, sequences=40, loss=3.0):
    """Sequences whose loss rises by that share of it, give or take half a per cent."""
    random = np.random.default_rng(seed)
    targets = np.full(sequences, 100.0)
    before = targets * loss * random.uniform(0.8, 1.2, sequences)
    after = before + targets * loss * random.normal(increase, 0.005, sequences)
    return Answers(before, after, 0 * before, targets, targets, 4 * targets)


def test_a_slice_that_suffers_more_is_named_with_what_it_suffers():
    slices = {"en": answers(0, 0.002), "de": answers(1, 0.002, loss=5.0), "sw": answers(2, 0.02)}
    (found,) = worse_slices(slices)
    assert found.name == "sw"
    assert found.increase == pytest.approx(0.02, abs=0.003)
    assert found.elsewhere == pytest.approx(0.002, abs=0.003)
    assert str(found).startswith("sw suffers more than the rest: loss +")


def test_slices_that_suffer_alike_are_rarely_named():
    """In 400 draws without any difference: 5 % of warnings, and what chance adds to that."""
    named = 0
    for draw in range(400):
        named += bool(worse_slices({str(i): answers(10 * draw + i, 0.01, loss=2.0 + i) for i in range(4)}))
    assert named <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5


def test_the_size_of_a_slice_does_not_matter():
    small = {"all": answers(0, 0.001, 200), "few": answers(1, 0.05, 4)}
    assert [slice_.name for slice_ in worse_slices(small)] == ["few"]


def test_there_is_nothing_to_compare_with():
    assert worse_slices({"only": answers(0, 0.5)}) == []
    assert worse_slices({"a": answers(0, 0.5, 1), "b": answers(1, 0.0)}) == []


def test_welch():
    random = np.random.default_rng(0)
    for sizes in ((5, 9), (30, 4), (2, 2)):
        a, b = random.normal(0.3, 1, sizes[0]), random.normal(0, 3, sizes[1])
        expected = ttest_ind(a, b, equal_var=False, alternative="greater").pvalue
        assert p_larger(a, b) == pytest.approx(expected, rel=1e-9)
    assert p_larger(np.zeros(3), np.zeros(3)) == 1.0
