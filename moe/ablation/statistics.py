"""Means over seeds, differences between rows, and when to call two rows equivalent.

Seeds are few and their spread is unknown, so everything rests on Student's t: exact for normal errors at any
number of seeds, and honest about how little two or three of them tell.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes seconds to import

CONFIDENCE = 0.95
"""Of all intervals; tests of equivalence have the matching level of 1 - CONFIDENCE."""

Verdict = Literal["better", "worse", "equivalent", "undecided", "too few seeds"]


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; the bounds are NaN for one value, all is NaN for none."""

    mean: float
    """Mean of the values."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""

    count: int
    """Number of values."""

    @property
    def half_width(self) -> float:
        """Distance from the mean to either end."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """A row against the baseline, seed by seed."""

    difference: Interval
    """Mean of row - baseline over the seeds that both have, negative where the row is lower."""

    equivalence: float
    """p of the two one-sided tests: small where the difference surely lies within the margin; NaN below two
    seeds."""

    verdict: Verdict
    """What follows from both, where lower is better."""


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval of independent values: mean ± t(n - 1) s / sqrt(n)."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * _standard_error(values)
    return Interval(mean, mean - reach, mean + reach, count)


def compare(row: Mapping[int, float], baseline: Mapping[int, float], margin: float) -> Comparison:
    """Compare two rows by the seeds that both have.

    A seed sets initial parameters and the order of the data alike for both rows, so the differences of pairs
    vary less than the rows themselves, as long as the architectures are alike; pairing is valid either way.

    Args:
        row: value of each seed; lower is better.
        baseline: the same of the row to compare with.
        margin: largest difference that does not matter, in the unit of the values.
    """
    differences = [row[seed] - baseline[seed] for seed in sorted(row.keys() & baseline.keys())]
    interval = t_interval(differences)
    p = equivalence(differences, margin)
    if interval.count < 2:
        verdict: Verdict = "too few seeds"
    elif interval.high < 0:
        verdict = "better"
    elif interval.low > 0:
        verdict = "worse"
    else:
        verdict = "equivalent" if p < 1 - CONFIDENCE else "undecided"
    return Comparison(interval, p, verdict)


def equivalence(differences: Sequence[float], margin: float) -> float:
    """p-value of two one-sided t-tests: the chance of such data if the mean were at or beyond ±margin.

    Schuirmann 1987, doi.org/10.1007/BF01068419: both "mean ≤ -margin" and "mean ≥ margin" must be refused, so
    the larger p counts. At level 0.05 that is the same as a 90 % t-interval inside ±margin.
    """
    count = len(differences)
    if count < 2:
        return math.nan
    mean, error = float(np.mean(differences)), _standard_error(differences)
    if error == 0:  # the same difference for every seed
        return 0.0 if abs(mean) < margin else 1.0
    above_lower = stdtr(count - 1, -(mean + margin) / error)
    below_upper = stdtr(count - 1, (mean - margin) / error)
    return float(max(above_lower, below_upper))


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))
