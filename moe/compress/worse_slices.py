"""Which slices of the data suffer more than the rest: compression must not hurt one language unseen."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr  # Student's t; scipy.stats takes seconds to import

from moe.compress.compare import Answers

LEVEL = 0.05
"""Probability of any warning at all where no slice suffers more than the rest."""

RULE = (
    "a sequence's increase is (loss after - loss before) / loss before of its slice; a slice is named where "
    "its sequences' mean lies above that of the others' in Welch's one-sided t-test, p < 0.05 / slices"
)


@dataclass(frozen=True)
class WorseSlice:
    """A slice that suffers more."""

    name: str
    increase: float
    """Mean relative increase of its sequences' loss."""

    elsewhere: float
    """The same over the sequences of all other slices."""

    p: float
    """Probability of a difference as large by chance."""

    def __str__(self) -> str:
        return (
            f"{self.name} suffers more than the rest: loss {self.increase:+.3%}, elsewhere "
            f"{self.elsewhere:+.3%} (p = {self.p:.1g})"
        )


def worse_slices(slices: Mapping[str, Answers]) -> list[WorseSlice]:
    """The slices that `RULE` names, the worst first; none where there is only one slice."""
    increases = {name: _increases(answers) for name, answers in slices.items()}
    found = []
    for name, own in increases.items():
        others = [values for other, values in increases.items() if other != name]
        if not others:
            continue
        rest = np.concatenate(others)
        p = p_larger(own, rest)
        if p < LEVEL / len(slices):
            found.append(WorseSlice(name, float(own.mean()), float(rest.mean()), p))
    return sorted(found, key=lambda slice_: slice_.elsewhere - slice_.increase)


def p_larger(a: np.ndarray, b: np.ndarray) -> float:
    """Welch's one-sided test that the mean behind `a` is larger; 1 where there is too little to tell."""
    if min(len(a), len(b)) < 2:
        return 1.0
    of_a, of_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if of_a + of_b == 0:
        return 1.0
    t = (a.mean() - b.mean()) / np.sqrt(of_a + of_b)
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return float(stdtr(freedom, -t))


def _increases(answers: Answers) -> np.ndarray:
    loss = answers.before.sum() / answers.targets.sum()
    return (answers.after - answers.before) / answers.targets / loss
