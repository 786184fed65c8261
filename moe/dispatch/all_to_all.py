"""Exchange by all-to-all: a token travels once to every device on which it has experts."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.exchange import Exchange, ExpertWeights, Returned, Work
from moe.dispatch.plan import by_expert
from moe.dispatch.rounds import Buffers, Rounds
from moe.errors import UserError
from moe.kernels import combine_rows, gather_rows
from moe.mesh import axes, axis_index, axis_size
from moe.routing.assignment import Routing


@dataclass(frozen=True)
class AllToAll(Exchange):
    """Tokens go to their devices in buffers of a fixed size, as many rounds as it takes; sums come back.

    A token goes once to a device, however many of its experts are there, with their numbers and combine
    weights, and one sum comes back. The dispatch's `chunks` rounds are always made, each of which can travel
    while another is computed; under even use they are enough, `room` times over. Where loads are so uneven
    that a buffer is full, further rounds follow until no device has tokens left. Nothing is dropped: uneven
    loads cost time. The backward pass of those further rounds makes their forward pass again.

    Which assignments keep a place is the dispatch's choice; what arrives is laid out without capacity.
    """

    room: float = 1.25
    """Size of the buffers relative to even use of the devices' experts."""

    def __post_init__(self):
        if not self.room > 0:
            raise UserError(f"model.moe.dispatch.exchange.room={self.room} must be positive")

    def check(self, *, keep_outputs: bool) -> None:
        """See `Exchange`."""
        if keep_outputs:
            raise UserError(
                f"model.moe.dispatch.exchange={self} brings back sums only, but the strategy or a balancer "
                "reads each expert's output; say Gather()"
            )

    def __call__(
        self, work: Work, x: Float[Array, "groups T D"], routing: Routing, weights: ExpertWeights
    ) -> Returned:
        """See `Exchange`."""
        self.check(keep_outputs=work.keep_outputs)
        groups, tokens, width = x.shape
        devices, held = axis_size("expert"), next(iter(weights.values())).shape[0]
        expert = routing.expert - work.first_expert
        known = (expert >= 0) & (expert < devices * held)
        dropped = known & work.dispatch.dropped(routing, work.num_experts)
        expert = jnp.where(known & ~dropped, expert, devices * held)
        expert, combine_weight = _by_token(routing, expert, tokens, devices * held)

        rounds, k = work.dispatch.chunks, -(-routing.expert.shape[1] // tokens)
        buffers = Buffers.sized(groups * tokens, k, expert.shape[1], devices, rounds, self.room)
        at_device = expert[..., None] // held == jnp.arange(devices)
        timetable = Rounds.of(jnp.sum(at_device, axis=1, dtype=jnp.int32), buffers)
        trip = Trip(self, work, rounds, buffers.hold(groups * tokens))
        flat = x.reshape(groups * tokens, width)
        # Checkers take a custom_vjp made through `partial` for an object without a type.
        y: Any = _there_and_back(trip, flat, combine_weight, weights, expert, timetable)
        return Returned(y.reshape(x.shape), dropped.astype("int8"), None)

    def swap(
        self, rows: Float[Array, "R ..."], sent: Int[Array, "devices"], received: Int[Array, "devices"]
    ) -> Float[Array, "R ..."]:
        """Equal parts of `rows` to each device, and those that they send here, in the devices' order.

        Args:
            rows: the places of one round.
            sent: how many of each part are taken.
            received: the same of what comes.
        """
        return jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0, tiled=True)


class Trip(NamedTuple):
    """What does not change from round to round, and is known while tracing."""

    exchange: AllToAll
    work: Work
    rounds: int  # that are always made
    enough: bool  # whether no further ones can be needed


def _by_token(routing: Routing, expert: Int[Array, "groups A"], tokens: int, nowhere: int):
    """Experts and combine weights [all tokens, K].

    Without a fixed K a token has a place for every expert; several assignments to one are made one, by the
    sum of their weights.
    """
    groups, weight = len(expert), routing.combine_weight
    if routing.per_token is not None:
        return (a.reshape(-1, routing.per_token) for a in (expert, weight))
    token = routing.token + tokens * jnp.arange(groups)[:, None]
    empty = jnp.zeros_like(expert, shape=(groups * tokens, nowhere))
    chosen = empty.at[token, expert].set(1, mode="drop")
    total = empty.astype(weight.dtype).at[token, expert].add(weight, mode="drop")
    return jnp.where(chosen > 0, jnp.arange(nowhere), nowhere), total


def _round(trip: Trip, expert, timetable: Rounds, number, x, combine_weight, weights):
    """What one round adds to each token's sum."""
    devices, held = timetable.buffers.devices, next(iter(weights.values())).shape[0]
    plan, sent = timetable.plan(number)
    received = jax.lax.all_to_all(sent, "expert", split_axis=0, concat_axis=0, tiled=True)
    goes = expert.at[plan.row_token(padding=len(x))].get(mode="fill", fill_value=devices * held)
    there = (gather_rows(x, plan), gather_rows(combine_weight, plan), goes)
    came, weight, number_of = (trip.exchange.swap(rows, sent, received) for rows in there)

    local = (number_of - axis_index("expert") * held).reshape(-1)
    token = jnp.repeat(jnp.arange(len(came)), expert.shape[1])
    most = devices * timetable.buffers.assignments
    here = by_expert(local, token, held, trip.work.dispatch.row_tile, expert.shape[1], most=most)
    y = trip.work.experts.of_tokens(weights, came, weight.reshape(-1), here)
    back = trip.exchange.swap(y, received, sent)
    return combine_rows(back, jnp.ones_like(plan.row, jnp.float32), plan, x[:, 0])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _there_and_back(trip, x, combine_weight, weights, expert, timetable):
    return _forward(trip, x, combine_weight, weights, expert, timetable)[0]


def _forward(trip: Trip, x, combine_weight, weights, expert, timetable):
    one_round, trained = partial(_round, trip, expert, timetable), (x, combine_weight, weights)
    made = [jax.vjp(partial(one_round, number), *trained) for number in range(trip.rounds)]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, *others = (y.astype(wide) for y, _ in made)
    y: Any = sum(others, start=first)

    def further(number, y):
        return y + one_round(number, *trained).astype(wide)

    y = _while_any_has_tokens(trip, timetable, further, y)
    return y.astype(x.dtype), ([back for _, back in made], trained, expert, timetable)


def _backward(trip: Trip, saved, y_bar):
    backs, trained, expert, timetable = saved
    bars = [back(y_bar) for back in backs]
    bar = jax.tree.map(lambda *bars: sum(bars[1:], start=bars[0]), *bars)

    def further(number, bar):
        _, back = jax.vjp(partial(_round, trip, expert, timetable, number), *trained)
        return jax.tree.map(jnp.add, bar, back(y_bar))

    return *_while_any_has_tokens(trip, timetable, further, bar), None, None


_there_and_back.defvjp(_forward, _backward)


def _while_any_has_tokens(trip: Trip, timetable: Rounds, further, start):
    """`start` after `further(number, ...)` of every round behind those that are always made.

    The number of rounds is that of the whole mesh, so that all devices leave the loop together.
    """
    if trip.enough:
        return start
    count = timetable.count(axes("group") + axes("mlp"))
    state = (jnp.int32(trip.rounds), start)
    return jax.lax.while_loop(lambda s: s[0] < count, lambda s: (s[0] + 1, further(*s)), state)[1]
