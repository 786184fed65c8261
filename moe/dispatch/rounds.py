"""Which token goes to which device in which round, where a round's buffers have a fixed size."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe.kernels import Groups, Plan

PARTS = 8  # of an assignment, in which a place's share of a round is counted


@dataclass(frozen=True)
class Buffers:
    """What one device sends another in one round at most."""

    devices: int
    """Along `expert`."""

    places: int
    """Tokens."""

    share: int
    """Assignments that a place stands for, in eighths; `places` times this is a round's budget."""

    per_token: int
    """Assignments of a token at most."""

    @staticmethod
    def sized(tokens: int, k: int, per_token: int, devices: int, rounds: int, room: float) -> "Buffers":
        """Buffers in which `rounds` rounds take all tokens of a device, `room` times over under even use.

        Under even use a token has some of its k experts on 1 - (1 - 1/n)^k of n devices, and there a binomial
        number of them. A place stands for their mean and half a deviation: for less, tokens with more than
        that would leave places empty, and for more, memory.

        Args:
            tokens: of a device.
            k: mean experts of a token.
            per_token: most of them.
            devices: n.
            rounds: in which all should go.
            room: factor on the buffers.
        """
        chance = {a: math.comb(k, a) * (devices - 1) ** (k - a) / devices**k for a in range(1, k + 1)}
        goes = sum(chance.values())
        mean = k / devices / goes
        variance = sum(p * a * a for a, p in chance.items()) / goes - mean**2
        share = math.ceil(PARTS * (mean + math.sqrt(max(variance, 0)) / 2))
        budget = room * tokens * sum(p * max(share, PARTS * a) for a, p in chance.items()) / rounds
        places = max(1, math.ceil(budget / share))
        if places > tokens:
            places, share = tokens, min(math.ceil(budget / tokens), PARTS * per_token)
        return Buffers(devices, places, share, per_token)

    @property
    def assignments(self) -> int:
        """Most assignments that the tokens of one round bring from one device to another."""
        budget = self.places * self.share // PARTS + self.per_token
        return min(budget, self.places * self.per_token)

    def hold(self, tokens: int) -> bool:
        """Whether one round is always enough."""
        return self.places >= tokens and self.share >= PARTS * self.per_token


@partial(jax.tree_util.register_dataclass, data_fields=["number"], meta_fields=["buffers"])
@dataclass(frozen=True)
class Rounds:
    """The rounds of one device's tokens.

    Towards each device tokens keep their order. Each takes a place, and of a round's budget what its
    assignments there need, a place's share at least; a round is full when its budget is spent. So neither
    places nor assignments can overflow, and what finds no room goes in the next round.
    """

    number: Int[Array, "T devices"]
    """The round in which a token goes to a device; -1 where it has no expert there."""

    buffers: Buffers

    @staticmethod
    def of(counts: Int[Array, "T devices"], buffers: Buffers) -> "Rounds":
        """From how many assignments each token has on each device."""
        goes = counts > 0
        least = buffers.share if buffers.places < len(counts) else 1  # no need to count places for all
        cost = jnp.where(goes, jnp.maximum(counts * PARTS, least), 0)
        spent = jnp.cumsum(cost, axis=0) - cost
        return Rounds(jnp.where(goes, spent // (buffers.places * buffers.share), -1), buffers)

    def count(self, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Rounds until every device of the mesh has sent all of its tokens."""
        return jax.lax.pmax(jnp.max(self.number, initial=-1) + 1, axes)

    def plan(self, number: Int[Array, ""] | int) -> tuple[Plan, Int[Array, "devices"]]:
        """The places of one round as rows, those towards the first device first; and how many are taken."""
        tokens, devices = self.number.shape
        here, places = self.number == number, self.buffers.places
        taken = jnp.cumsum(here, axis=0, dtype=jnp.int32)
        place = jnp.arange(devices) * places + taken - 1
        row = jnp.where(here, place, devices * places).reshape(-1)
        token = jnp.repeat(jnp.arange(tokens), devices)
        layout = Groups(jnp.full_like(row, places, shape=(devices,)), tile=places, uniform=True)
        plan = Plan.build(row, token, jnp.zeros_like(row, bool), layout, devices * places, devices)
        return plan, taken[-1]
