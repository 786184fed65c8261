"""The speed of reading prompts and of making tokens, by the programs that `moe.decode.Engine` runs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from moe.analysis.profile import kernels_launched
from moe.decode import CacheType, Decoder, Request, Sampling
from moe.decode.slots import Programs, Sequences, Slots
from moe.evaluation.steps import profile_record, seconds_between_ends
from moe.mesh import spec

STEPS_AT_ONCE = 8  # decode steps for each call of the program
READS = 16  # prompts that are timed, at least
ENDLESS = 10**6  # tokens that a sequence may make, so that none ends amid the measurement


@dataclass(frozen=True)
class Serving:
    """What is served."""

    prompt: int
    """Tokens of each prompt."""

    context: int
    """Tokens that the cache holds of each sequence; a decode step reads them all."""

    batches: tuple[int, ...]
    """Sequences that are decoded together on each device, ascending."""

    cache: CacheType
    """How keys and values are stored."""


@dataclass(frozen=True)
class Measured:
    """Times of one program."""

    seconds: list[float]
    """Of each call, or of each token where a call makes several."""

    kernels: int
    """That one prompt, or one decode step, starts."""

    profile: dict[str, Any] | None
    """See `profile_record`; None where none was taken."""


def measure_serving(
    decoder: Decoder, serving: Serving, *, calls: int, profiled: int
) -> Iterator[tuple[int, Measured]]:
    """First of reading one prompt on each device (batch 0), then of a decode step at each batch size.

    Prompts are random and tokens are drawn at temperature 1, so that sequences differ and go to different
    experts. Every device has as many sequences, on the mesh that is set.

    Args:
        decoder: the model.
        serving: prompts, cache and batch sizes.
        calls: decode calls that are timed at each batch size.
        profiled: calls that are profiled, of prompts and of the smallest and the largest batch; 0: none.
    """
    vocabulary, devices, most = decoder.config.vocab_size, jax.device_count(), max(serving.batches)
    programs, leaves = Programs.of(decoder, vocabulary), jax.tree.leaves(decoder)
    slots: Any = Slots.empty(decoder, devices * most, serving.context, serving.cache)
    random = np.random.default_rng(0)

    def prompts(number: int):
        tokens = random.integers(vocabulary, size=(devices, serving.prompt), dtype=np.int32)
        requests: list[Request | None] = [
            Request(tuple(row), ENDLESS, Sampling(seed=devices * number + i))
            for i, row in enumerate(tokens.tolist())
        ]
        return tokens, np.full(devices, number % most, np.int32), Sequences.of(requests)

    lowered = programs.prefill.lower(leaves, slots, *prompts(0))
    compiled = lowered.compile()

    def read(program: Any = compiled, number: int = 0) -> Any:
        nonlocal slots
        slots, made = program(leaves, slots, *prompts(number))
        return made

    jax.block_until_ready(read())
    seconds = []
    for number in range(max(most, READS)):
        given = prompts(number)
        started = time.perf_counter()
        slots, made = compiled(leaves, slots, *given)
        made.block_until_ready()
        seconds.append(time.perf_counter() - started)
    record = profile_record(read, lowered, compiled, profiled) if profiled else None
    yield 0, Measured(seconds, kernels_launched(compiled.as_text()), record)

    for batch in serving.batches:
        wanted = profiled if batch in (min(serving.batches), most) else 0
        yield batch, _decode(programs, leaves, _first(slots, batch), devices * batch, calls, wanted)


def _decode(programs: Programs, leaves, slots: Slots, rows: int, calls: int, profiled: int) -> Measured:
    """Decode steps of slots that are all in use."""
    released = np.zeros(rows, bool)
    lowered = programs.step.lower(leaves, slots, released, STEPS_AT_ONCE)
    compiled = lowered.compile()

    def step(program=compiled):
        nonlocal slots
        slots, made = program(leaves, slots, released)
        return made

    seconds = [call / STEPS_AT_ONCE for call in seconds_between_ends(step, calls)]
    record = profile_record(step, lowered, compiled, profiled, STEPS_AT_ONCE) if profiled else None
    return Measured(seconds, kernels_launched(compiled.as_text()), record)


def _first(slots: Slots, batch: int) -> Slots:
    """The first sequences of each device, anew and all in use."""

    @jax.jit
    @jax.shard_map(in_specs=spec("batch"), out_specs=spec("batch"))
    def first(slots):
        return jax.tree.map(lambda rows: rows[:batch], slots)

    found = first(slots)
    return replace(found, sequences=replace(found.sequences, left=found.sequences.left * 0 + ENDLESS))
