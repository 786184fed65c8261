"""The two compiled programs of generation, over a fixed number of slots: read prompts in, go on with all."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moe.decode.cache import CacheType, LayerCache
from moe.decode.model import Caches, Decoder
from moe.decode.request import MOST_STOPS, Request
from moe.decode.sampling import Sampling, SamplingRows, sample
from moe.mesh import spec

NONE = -1  # in the place of a token where there is none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """Sequences in progress, a row each."""

    token: Int[Array, "B"]
    """The last token, which the next step feeds."""

    position: Int[Array, "B"]
    """Where it stands; at the beginning, where the prompt ends."""

    made: Int[Array, "B"]
    """Tokens generated so far."""

    left: Int[Array, "B"]
    """Tokens that may still be generated; 0 for a slot that is free."""

    stop: Int[Array, "B MOST_STOPS"]
    """Tokens that end the sequence, filled up with NONE."""

    sampling: SamplingRows

    @staticmethod
    def of(requests: list[Request | None]) -> "Sequences":
        """Sequences about to begin, on the host; None leaves a row free."""

        def column(of, free: Any = 0) -> Any:
            return np.array([free if request is None else of(request) for request in requests], np.int32)

        nothing, no_stop = column(lambda _: 0), (NONE,) * MOST_STOPS
        return Sequences(
            token=nothing,
            position=column(lambda request: len(request.prompt) - 1),
            made=nothing,
            left=column(lambda request: request.max_new_tokens),
            stop=column(lambda request: (*request.stop_tokens, *no_stop)[:MOST_STOPS], no_stop),
            sampling=SamplingRows.of([request.sampling if request else Sampling() for request in requests]),
        )

    def follow(self, logits, vocabulary: int) -> "Sequences":
        """Each active sequence with the next token; the others as they are."""
        active = self.left > 0
        token = sample(logits, self.sampling, self.made, vocabulary)
        stopped = (token[:, None] == self.stop).any(1)
        return replace(
            self,
            token=jnp.where(active, token, self.token),
            position=self.position + active,
            made=self.made + active,
            left=jnp.where(stopped, 0, self.left - active),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """All that generation carries from step to step: a row for each slot, split over the mesh."""

    caches: Caches
    sequences: Sequences

    @staticmethod
    def empty(decoder: Decoder, slots: int, length: int, cache: CacheType) -> "Slots":
        """Free slots on the mesh that is set.

        Args:
            decoder: whose caches they hold.
            slots: B, over all devices.
            length: most tokens of a sequence, prompt included.
            cache: how keys and values are stored.
        """

        @jax.jit
        def make():
            attention, dtype = decoder.config.attention, jnp.dtype(cache)
            caches = tuple(LayerCache.empty(attention, slots, length, dtype) for _ in decoder.layers)
            return Slots(caches, jax.sharding.reshard(Sequences.of([None] * slots), spec("batch")))

        return make()


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a decoder; each hands back the slots that it takes."""

    prefill: Any
    """(leaves, slots, prompts [R, s], slot [R], sequences of R rows) -> slots, tokens [1, R]: reads prompts
    into slots, each numbered on its device, and makes the first token of each."""

    step: Any
    """(leaves, slots, released [B], steps) -> slots, tokens [steps, B]: frees the released slots, then takes
    up to `steps` steps of all others; NONE where a slot makes no token."""

    @staticmethod
    def of(decoder: Decoder, vocabulary: int) -> "Programs":
        """Programs for a decoder's structure, whose parameters are given as `leaves`: a flat list is handed
        over faster than a tree of modules.

        Args:
            decoder: the model, or its shapes.
            vocabulary: tokens that may be drawn.
        """
        structure = jax.tree.structure(decoder)

        def prefill(leaves, slots: Slots, prompts, slot, sequences: Sequences):
            decoder: Decoder = jax.tree.unflatten(structure, leaves)
            prompts, slot, sequences = jax.sharding.reshard((prompts, slot, sequences), spec("batch"))
            logits, caches = decoder.prefill(slots.caches, prompts, sequences.position + 1, slot)
            sequences = sequences.follow(logits, vocabulary)
            return Slots(caches, _put(slots.sequences, slot, sequences)), sequences.token[None]

        def step(leaves, slots: Slots, released: Bool[Array, "B"], steps: int):
            decoder: Decoder = jax.tree.unflatten(structure, leaves)
            released = jax.sharding.reshard(released, spec("batch"))
            sequences = slots.sequences
            sequences = replace(sequences, left=jnp.where(released, 0, sequences.left))

            def any_left(carry):
                i, slots, _ = carry
                return (i < steps) & jax.sharding.reshard((slots.sequences.left > 0).any(), spec())

            def one(carry):
                i, slots, tokens = carry
                before = slots.sequences
                active = before.left > 0
                logits, caches = decoder.step(slots.caches, before.token, before.position, active)
                after = before.follow(logits, vocabulary)
                made = jnp.where(active, after.token, NONE)
                return i + 1, Slots(caches, after), tokens.at[i].set(made)

            tokens = jnp.full((steps, len(released)), NONE, jnp.int32, out_sharding=spec(None, "batch"))
            carry = (jnp.int32(0), Slots(slots.caches, sequences), tokens)
            _, slots, tokens = jax.lax.while_loop(any_left, one, carry)
            return slots, tokens

        return Programs(jax.jit(prefill, donate_argnums=1), jax.jit(step, static_argnums=3, donate_argnums=1))


def _put(into: Sequences, slot: Int[Array, "R"], rows: Sequences) -> Sequences:
    """The rows in their slots, each numbered on its device; rows without such a slot are left out."""

    def on_one_device(into, slot, rows):
        return jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), into, rows)

    put = jax.shard_map(on_one_device, in_specs=spec("batch"), out_specs=spec("batch"))
    return put(into, slot, rows)
