"""How fast prompts are read and tokens are made, with one set of weights and with another."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import jax
import numpy as np
from flax import nnx

from moe.data import Data
from moe.decode import Decoder, Engine, Request, Sampling
from moe.errors import UserError
from moe.nn import TransformerConfig

ROUNDS = 5  # with the one and the other in turn, so that both meet the same noise


@dataclass(frozen=True)
class Workload:
    """What is generated to take the time."""

    prompt: int
    """Tokens of each prompt."""

    new: int
    """Tokens made of each."""

    batches: tuple[int, ...] = (1, 8)
    """Sequences in progress at once, on each device."""

    @staticmethod
    def like(data: Data) -> "Workload":
        """Sequences of the length trained on, half of them prompt."""
        half = data.sequence_length // 2
        return Workload(prompt=half, new=data.sequence_length - half)


@dataclass(frozen=True)
class Speed:
    """Tokens a second over all devices, the median of several rounds."""

    batch: int
    """Sequences in progress at once, over all devices."""

    prefill: list[float]
    """Of prompts read; for each set of weights."""

    decode: list[float]
    """Of tokens made behind the first of each sequence."""


def measure_speed(
    config: TransformerConfig, weights: Sequence[nnx.State], controllers: nnx.State, workload: Workload
) -> list[Speed] | str:
    """Greedy generation with each set of weights; or why this model does not generate.

    Args:
        config: of the model.
        weights: its parameters, quantised or not.
        controllers: state of balance controllers and strategies.
        workload: what to generate.
    """
    if jax.process_count() > 1:
        return "speed is measured by a single process"
    try:
        decoders = [Decoder.of(config, params, controllers) for params in weights]
    except UserError as error:
        return str(error)
    return [speed_of(decoders, batch * jax.device_count(), workload) for batch in workload.batches]


def speed_of(decoders: Sequence[Decoder], batch: int, workload: Workload) -> Speed:
    """Greedy generation with each decoder, so many sequences at once over all devices."""
    vocabulary = decoders[0].config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, workload.prompt)).tolist()
    engines = [
        Engine(
            decoder,
            vocabulary=vocabulary,
            slots=batch,
            length=workload.prompt + workload.new,
            cache=_cache(decoder.config),
            steps=workload.new,
        )
        for decoder in decoders
    ]

    def seconds(engine: Engine, new: int) -> float:
        requests = [Request(tuple(prompt), new, Sampling(temperature=0.0)) for prompt in prompts]
        began = time.perf_counter()
        engine.generate(requests)
        return time.perf_counter() - began

    for engine in engines:
        engine.warm_up([workload.prompt])
    reading, all_of_it = [[] for _ in engines], [[] for _ in engines]
    for _ in range(ROUNDS):
        for i, engine in enumerate(engines):
            reading[i].append(seconds(engine, 1))
            all_of_it[i].append(seconds(engine, 1 + workload.new))
    making = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(all_of_it, reading, strict=True)]
    return Speed(
        batch,
        prefill=[batch * workload.prompt / median(each) for each in reading],
        decode=[batch * workload.new / median(each) for each in making],
    )


def _cache(config: TransformerConfig):
    return "bfloat16" if config.compute_dtype == "bfloat16" else "float32"
