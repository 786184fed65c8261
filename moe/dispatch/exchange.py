"""The interface of exchanges: how tokens reach the devices that hold their experts, and sums come back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Array, Float, Int, Int8

from moe.kernels import Groups, Plan
from moe.routing.assignment import Routing

if TYPE_CHECKING:
    from moe.dispatch.dispatch import Dispatch

ExpertWeights = dict[str, Float[Array, "E ..."]]


@dataclass(frozen=True)
class ExpertFunction:
    """What the experts compute, whatever brings them their tokens."""

    of_rows: Callable[[ExpertWeights, Float[Array, "R D"], Groups], Float[Array, "R D"]]
    """From rows grouped by expert to rows of output."""

    of_tokens: Callable[[ExpertWeights, Float[Array, "T D"], Float[Array, "A"], Plan], Float[Array, "T D"]]
    """From tokens, combine weights and a plan to each token's weighted sum, without keeping any rows."""

    of_assignments: Callable[[ExpertWeights, Float[Array, "T D"], Int[Array, "A"], Plan], Float[Array, "A D"]]
    """From tokens, each assignment's expert and a plan to each assignment's output: for few of them, and
    without a gradient."""


@dataclass(frozen=True)
class Work:
    """What all devices along `expert` do together for one layer."""

    dispatch: "Dispatch"
    """Who keeps a place, and how rows lie."""

    experts: ExpertFunction
    """What the experts compute."""

    first_expert: int
    """Number in a `Routing` of the first expert that any of them holds."""

    num_experts: int
    """All that a `Routing` chooses from."""

    keep_outputs: bool
    """Whether each assignment's output is wanted, too."""


class Returned(NamedTuple):
    """What a device has back for its own tokens."""

    y: Float[Array, "groups T D"]
    """Each token's outputs, summed by combine weight."""

    dropped: Int8[Array, "groups A"]
    """1 where an assignment found no room."""

    outputs: Float[Array, "groups A D"] | None
    """Each assignment's output, zeros where it has none; None unless asked for."""


@dataclass(frozen=True)
class Exchange:
    """Brings tokens along `expert` to their experts, and sums back. A frozen dataclass, and its own config.

    Whichever is chosen computes the same; they differ in what travels and what memory they take.
    """

    def check(self, *, keep_outputs: bool) -> None:
        """Refuse to bring back what it does not.

        Args:
            keep_outputs: whether each assignment's output is wanted, besides each token's sum.

        Raises:
            UserError: one line naming the field.
        """

    def __call__(
        self, work: Work, x: Float[Array, "groups T D"], routing: Routing, weights: ExpertWeights
    ) -> Returned:
        """On one of several devices along `expert`, inside `jax.shard_map`.

        Args:
            work: what all of them do.
            x: this device's tokens.
            routing: their assignments, to any device's experts; fields [groups, A].
            weights: of this device's experts.
        """
        raise NotImplementedError
