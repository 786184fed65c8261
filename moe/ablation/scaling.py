"""More experts, or finer ones, at equal active compute: what they gain, by a fit, and what they cost.

Of the rows of a sweep those count whose tokens multiply as much as any other's in experts of another number
or granularity. With E experts of which a token visits K, all together as wide as one dense layer, G = K is
the granularity and R = E / K the expansion, total over active experts (2402.07871, section 3). The fit is

    ln loss = a + b ln R + c ln G

what a sweep of one active size and one length of training can tell of the laws of 2202.01169 (experts,
without their saturation) and 2402.07871 (granularity): b and c say by how much a doubling of experts, and of
granularity, changes the loss there. Nothing is said of other sizes or lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from scipy.special import stdtrit

from moe.ablation.statistics import CONFIDENCE, Interval
from moe.ablation.summary import RowSummary, Sweep
from moe.analysis.cost.passes import decode, total
from moe.mesh import MeshConfig, make_mesh

FEWEST = 5  # rows of a fit of three numbers, of at least two granularities and two expansions
BATCHES = (1, 32)  # of which a decode step's bytes are given


@dataclass(frozen=True)
class Point:
    """A row in its place: its shape, its loss, and what it costs."""

    name: str
    """Of the row."""

    experts: int
    """E, of each layer; 0 where all layers are dense."""

    granularity: float
    """G, the experts that a token visits; NaN where all layers are dense."""

    total_params: int
    """Parameters."""

    loss: Interval
    """Validation loss over seeds, nats per token."""

    losses: tuple[float, ...]
    """That of every seed."""

    step_seconds: float
    """Of a train step, mean over seeds."""

    decode_bytes: tuple[float, ...]
    """Read for a token made, in bfloat16, with a cache of the sequence length; for each of `BATCHES`."""

    @property
    def expansion(self) -> float:
        """R, total over active experts."""
        return self.experts / self.granularity


@dataclass(frozen=True)
class Fit:
    """ln loss = a + b ln R + c ln G by least squares, each run an observation."""

    constant: float
    """a."""

    of_doubling_experts: Interval
    """Relative change of the loss where R doubles, 2^b - 1, with its t-interval."""

    of_doubling_granularity: Interval
    """Relative change of the loss where G doubles, 2^c - 1, with its t-interval."""

    residual: float
    """Standard deviation of ln loss about the fit."""

    explained: float
    """R^2, the share of the variance of ln loss that the fit explains."""

    def loss(self, expansion: float, granularity: float) -> float:
        """Loss of the fit, nats per token."""
        b, c = (
            math.log1p(doubling.mean) / math.log(2)
            for doubling in (self.of_doubling_experts, self.of_doubling_granularity)
        )
        return math.exp(self.constant + b * math.log(expansion) + c * math.log(granularity))


@dataclass(frozen=True)
class Scaling:
    """The sweep as a question of how many experts, and how fine."""

    points: tuple[Point, ...]
    """Rows of mixtures, in order."""

    dense: Point | None
    """The row without experts, if there is one."""

    fit: Fit
    """Over the points' runs."""


def scaling(sweep: Sweep) -> Scaling | None:
    """What a sweep tells of experts and granularity; None where its rows ask something else.

    Rows must differ in experts, their width and the number that a token visits, and in nothing that changes
    active compute; the mixtures must be of two granularities and two expansions at least.
    """
    rows = [row for row in sweep.rows if row.loss.count and not row.other_compute]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):  # what a model costs is the same on any
        points = [_point(row) for row in rows]
    mixed, dense = [p for p in points if p.experts], [p for p in points if not p.experts]
    kinds = {p.granularity for p in mixed}, {p.expansion for p in mixed}
    shapes = {(p.experts, p.granularity) for p in mixed}
    if len(mixed) < FEWEST or len(shapes) < len(mixed) or min(map(len, kinds)) < 2:
        return None
    return Scaling(tuple(mixed), dense[0] if dense else None, fit(mixed))


def fit(points: Sequence[Point]) -> Fit:
    """The fit over every run of the points."""
    runs = [(p.expansion, p.granularity, loss) for p in points for loss in p.losses]
    expansion, granularity, loss = np.log(np.array(runs)).T
    inputs = np.stack([np.ones_like(expansion), expansion, granularity], axis=1)
    found, *_ = np.linalg.lstsq(inputs, loss)
    left = loss - inputs @ found
    freedom = len(loss) - len(found)
    variance = float(left @ left) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(inputs.T @ inputs)))
    reach = stdtrit(freedom, (1 + CONFIDENCE) / 2) * errors

    def doubling(i: int) -> Interval:
        mean, low, high = (math.expm1(math.log(2) * (found[i] + d)) for d in (0.0, -reach[i], reach[i]))
        return Interval(mean, low, high, len(loss))

    spread = float(((loss - loss.mean()) ** 2).sum())
    explained = 1 - float(left @ left) / spread if spread else math.nan
    return Fit(float(found[0]), doubling(1), doubling(2), math.sqrt(variance), explained)


def _point(row: RowSummary) -> Point:
    assert row.row.experiment is not None
    model, length = row.row.experiment.model, row.row.experiment.data.sequence_length
    mixture = model.moe_layers > 0
    read = (total(decode(model, batch, length)).bytes / batch for batch in BATCHES)
    return Point(
        row.name,
        model.moe.num_experts if mixture else 0,
        model.moe.experts_per_token(length) if mixture else math.nan,
        row.compute.total_params,
        row.loss,
        tuple(result.loss for result in row.finished if math.isfinite(result.loss)),
        row.step_seconds.mean,
        tuple(read),
    )
