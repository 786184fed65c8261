"""Continuous batching: requests share a fixed number of slots; one that ends makes room for the next."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import jax
import numpy as np

from moe.decode.cache import CacheType
from moe.decode.model import Decoder
from moe.decode.request import Request
from moe.decode.slots import NONE, Programs, Sequences, Slots
from moe.errors import UserError
from moe.mesh import BATCH, axis_size

SMALLEST_BUCKET = 16  # tokens


@dataclass(frozen=True)
class Made:
    """New tokens of a request."""

    request: int
    """Its number, in the order of submission."""

    tokens: list[int]
    last: bool
    """Whether the request has ended with them."""

    stopped: bool
    """Whether the last of them is one of its stop tokens."""


@dataclass(eq=False)
class _Running:
    """A request that waits for a slot or is in one."""

    number: int
    request: Request
    made: int = 0
    ended: bool = False

    def take(self, tokens: list[int]) -> Made:
        """What is told of new tokens."""
        self.made += len(tokens)
        stopped = tokens[-1] in self.request.stop_tokens
        self.ended = stopped or self.made == self.request.max_new_tokens
        return Made(self.number, tokens, self.ended, stopped)


@dataclass(frozen=True)
class _Launched:
    """Tokens that devices are making, and for whom."""

    rows: list[_Running | None]
    tokens: jax.Array  # [steps, rows]


class Engine:
    """Generates for any number of requests at once.

    Args:
        decoder: the model.
        vocabulary: tokens that may be drawn: those of the tokenizer.
        slots: requests in progress at once, a multiple of the devices.
        length: tokens that a slot holds, the prompt's and all generated ones but the last.
        cache: how keys and values are stored.
        steps: tokens of a slot for each call of the compiled program. With 1 every token is seen as soon as
            it is made; more save the host's part of the work.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        vocabulary: int,
        slots: int,
        length: int,
        cache: CacheType,
        steps: int = 1,
    ):
        self._devices = prod(axis_size(name) for name in BATCH)
        if slots < 1 or slots % self._devices:
            raise UserError(f"slots={slots} must be a positive multiple of the {self._devices} devices")
        self._length, self._steps = length, steps
        self._programs = Programs.of(decoder, vocabulary)
        self._leaves = jax.tree.leaves(decoder)
        self._state = Slots.empty(decoder, slots, length, cache)
        self._slots: list[_Running | None] = [None] * slots
        self._released = np.zeros(slots, bool)
        self._waiting: deque[_Running] = deque()
        self._submitted = 0

    def warm_up(self, prompt_lengths: Iterable[int]) -> None:
        """Compile what requests with prompts of these lengths need."""
        for bucket in {self._bucket(length) for length in prompt_lengths}:
            self._prefill(bucket, {}).tokens.block_until_ready()
        self._step().tokens.block_until_ready()

    def submit(self, request: Request) -> int:
        """Put a request at the end of the queue, and say its number.

        Raises:
            UserError: its prompt is empty or leaves no room in a slot.
        """
        if not request.prompt:
            raise UserError("a prompt must hold at least one token")
        room = self._length - len(request.prompt) + 1  # the last token is never fed
        if room < 1:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens is longer than the cache of {self._length}; "
                "shorten it, or make the cache longer"
            )
        fitting = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        running = _Running(self._submitted, fitting)
        self._waiting.append(running)
        self._submitted += 1
        return running.number

    def cancel(self, number: int) -> None:
        """End a request; nothing more of it is told."""
        self._waiting = deque(one for one in self._waiting if one.number != number)
        for slot, running in enumerate(self._slots):
            if running and running.number == number:
                running.ended = True
                self._slots[slot], self._released[slot] = None, True

    def run(self) -> Iterator[Made]:
        """Generate until no request is left; more may be submitted meanwhile."""
        launched: deque[_Launched] = deque()
        while self._waiting or any(self._slots) or launched:
            while (admitted := self._admit()) is not None:
                yield from self._read(self._prefill(*admitted))
            if any(self._slots):
                launched.append(self._step())
            # The host reads a step's tokens while the devices take the next one.
            while len(launched) > any(self._slots):
                yield from self._read(launched.popleft())

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """The new tokens of each request."""
        tokens = {self.submit(request): [] for request in requests}
        for made in self.run():
            tokens[made.request] += made.tokens
        return list(tokens.values())

    def _admit(self) -> tuple[int, dict[int, _Running]] | None:
        """A bucket, and waiting requests of that bucket for free slots: one for each device that has both."""
        if not self._waiting:
            return None
        bucket, admitted = self._bucket(len(self._waiting[0].request.prompt)), {}
        for device in range(self._devices):
            free = next((slot for slot in self._on(device) if self._slots[slot] is None), None)
            fits = (one for one in self._waiting if self._bucket(len(one.request.prompt)) == bucket)
            running = next(fits, None)
            if free is not None and running is not None:
                self._waiting.remove(running)
                self._slots[free] = admitted[free] = running
        return (bucket, admitted) if admitted else None

    def _prefill(self, bucket: int, admitted: dict[int, _Running]) -> _Launched:
        """Read prompts into their slots: a row for each device."""
        per_device = len(self._slots) // self._devices
        rows: list[_Running | None] = [None] * self._devices
        prompts = np.zeros((self._devices, bucket), np.int32)
        place = np.full(self._devices, per_device, np.int32)  # no slot
        for slot, running in admitted.items():
            device, place_there = divmod(slot, per_device)
            rows[device], place[device] = running, place_there
            prompts[device, : len(running.request.prompt)] = running.request.prompt
            self._released[slot] = False  # the prompt takes the place of what was cancelled
        sequences = Sequences.of([running and running.request for running in rows])
        self._state, tokens = self._programs.prefill(self._leaves, self._state, prompts, place, sequences)
        return _Launched(rows, tokens)

    def _step(self) -> _Launched:
        """Go on with all slots."""
        released, self._released = self._released, np.zeros_like(self._released)
        self._state, tokens = self._programs.step(self._leaves, self._state, released, self._steps)
        return _Launched(list(self._slots), tokens)

    def _read(self, launched: _Launched) -> Iterator[Made]:
        """Wait for tokens, tell them, and free the slots of requests that end with them."""
        tokens = np.asarray(launched.tokens)
        for row, running in enumerate(launched.rows):
            made = [int(token) for token in tokens[:, row] if token != NONE]
            if running and made and not running.ended:
                told = running.take(made)
                if told.last:
                    self._slots[self._slots.index(running)] = None
                yield told

    def _on(self, device: int) -> range:
        """Slots of a device."""
        per_device = len(self._slots) // self._devices
        return range(device * per_device, (device + 1) * per_device)

    def _bucket(self, length: int) -> int:
        """To how many tokens a prompt is padded: a power of two, or the whole cache."""
        return min(max(1 << (length - 1).bit_length(), SMALLEST_BUCKET), self._length)
