"""`eval.py ... --speed`: a config or a run on the present device, measured beside its prediction."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import optax

from moe.analysis.cost.forecast import bytes_between_products
from moe.analysis.cost.memory import training_memory
from moe.analysis.cost.passes import decode, prefill, train_step
from moe.data import prepare, train_batches
from moe.decode import CacheType, Decoder, for_decoding
from moe.errors import UserError
from moe.evaluation.rates import measured_rates
from moe.evaluation.serving import Serving, measure_serving
from moe.evaluation.speed import Timing, report, shared
from moe.evaluation.speed_table import show
from moe.evaluation.train_step import measure_train_step
from moe.experiment import Experiment
from moe.mesh import make_mesh
from moe.nn.quantized import quantize_params
from moe.quant import format_named
from moe.training.evaluate import own_rows, to_devices
from moe.training.prediction import asked_of, measured_load
from moe.training.restore import restore
from moe.training.run_directory import read_experiment
from moe.training.state import initial_state

INPUTS = 12  # batches that the input is timed over


@dataclass(frozen=True)
class Speed(Experiment):
    """An experiment, and how its speed is measured."""

    speed: bool = True
    """Measure train steps, prompts and decode steps on the devices that are here, beside their prediction."""

    checkpoint: str = "last"
    """Of a run: `last`, `best` or a step. A config has random weights."""

    quantize: str = ""
    """Format in which weights are served, as with generate.py."""

    cache: CacheType | None = None
    """How keys and values are stored; None takes the precision of activations."""

    context: int = 0
    """Tokens that the cache holds of each sequence; 0 takes data.sequence_length."""

    prompt: int = 0
    """Tokens of a prompt; 0 takes half the context."""

    batches: tuple[int, ...] = (1, 8, 32)
    """Sequences that are decoded together, on each device."""

    calls: int = 24
    """Train steps, and calls of eight decode steps, over which percentiles are taken."""

    profiled: int = 3
    """Calls that are profiled after those; 0 leaves profiles out."""

    skip_train: bool = False
    """Leave out the train step, for a model whose training does not fit the device."""

    skip_serving: bool = False
    """Leave out prompts and decode steps."""

    def __post_init__(self):
        super().__post_init__()
        if not self.batches or min(self.batches) < 1:
            raise UserError(f"batches={self.batches} must be one or more numbers of at least 1")
        for name, least in (("context", 0), ("prompt", 0), ("profiled", 0), ("calls", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.prompt_length > self.context_length:
            raise UserError(f"prompt={self.prompt} is longer than the context of {self.context_length}")
        if self.quantize:
            format_named(self.quantize)
            if self.quantization.weights:
                raise UserError("--quantize is for runs that are not quantised already")
        if self.skip_train and self.skip_serving:
            raise UserError("--skip-train and --skip-serving leave nothing to measure")

    @property
    def context_length(self) -> int:
        """Tokens that the cache holds."""
        return self.context or self.data.sequence_length

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt."""
        return self.prompt or max(1, self.context_length // 2)

    @property
    def weights(self) -> str:
        """Format of the served weights, as predictions name it."""
        plain = "f32" if self.model.compute_dtype == "float32" else "bf16"
        return self.quantize or self.quantization.weights or plain

    @property
    def cache_type(self) -> CacheType:
        """How keys and values are stored."""
        return self.cache or ("bfloat16" if self.model.compute_dtype == "bfloat16" else "float32")


def measure_speed(path: str, arguments: list[str]) -> None:
    """Print how fast a config or a run is here, and keep it in runs/NAME/report/speed.json.

    Args:
        path: a config file, or a run directory.
        arguments: fields of `Speed`, as on the command line.

    Raises:
        UserError: one line naming the field or file.
    """
    asked, directory = asked_of(path, arguments, Speed)
    run = None if path.endswith(".py") else directory
    found = {"arguments": arguments} | speed_report(asked, run)
    show(found)
    written = directory / "report" / "speed.json"
    try:
        written.parent.mkdir(parents=True, exist_ok=True)
        temporary = written.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(written)
    except OSError as error:
        raise UserError(f"cannot write {written}: {error.strerror}") from error
    print(f"written: {written}")


def speed_report(asked: Speed, run: Path | None) -> dict:
    """The report of what is asked, as JSON holds it.

    Args:
        asked: what is measured, and how.
        run: directory whose weights, data and measured load are taken; None takes random weights.

    Raises:
        UserError: it does not fit the device, or cannot be served.
    """
    if jax.process_count() > 1:
        raise UserError("speed is measured by a single process")
    if run and read_experiment(run).model != asked.model:
        raise UserError(f"{run} is measured as it was trained; give a config to measure another model")
    serves = not asked.skip_serving and (asked.skip_train or not asked.model.looks_ahead)
    if serves:
        for_decoding(asked.model)
    jax.set_mesh(make_mesh(asked.mesh))
    rates = measured_rates(asked.model, asked.data.sequence_length)
    load = measured_load(run, asked) if run else None
    try:
        timings = [] if asked.skip_train or asked.quantization.weights else [_train(asked, run)]
        timings += _serve(asked, run, load) if serves else []
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device's memory does not hold it; lower --batches, --context or --train.batch-size, or pass "
            "--skip-train"
        ) from error
    told = {
        "weights": asked.weights,
        "cache": asked.cache_type,
        "context": asked.context_length,
        "prompt": asked.prompt_length,
        "load": "even" if load is None else "measured",
    }
    return report(asked.name, told, rates, timings)


def _train(asked: Speed, run: Path | None) -> Timing:
    settings, length = asked.train, asked.data.sequence_length
    measured = measure_train_step(asked, asked.calls, asked.profiled)
    tokens = settings.batch_size * length
    memory = training_memory(asked.model, asked.optimizer, tokens=tokens, length=length)
    parts = train_step(
        asked.model,
        settings.batch_size,
        length,
        accumulation=settings.accumulation,
        state_bytes=memory.state,
    )
    devices = jax.device_count()
    return Timing(
        "train step",
        settings.batch_size // devices,
        tokens // devices,
        shared(parts, devices),
        bytes_between_products(asked.model, tokens, training=True) / devices,
        measured["kernels"],
        measured["seconds"],
        measured["profile"],
        _seconds_of_input(asked) if run else None,
    )


def _seconds_of_input(asked: Speed) -> float:
    """Median time in which the host makes a batch of the run's data and brings it to the devices."""
    batches = train_batches(
        prepare(asked.data),
        batch_size=asked.train.batch_size,
        sequence_length=asked.data.sequence_length,
        weights=asked.data.weights,
        seed=asked.seed,
        rows=own_rows(asked.train.batch_size),
    )
    seconds = []
    for _ in range(INPUTS):
        started = time.perf_counter()
        batch = next(batches)
        jax.block_until_ready(to_devices(batch["tokens"]))
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def _serve(asked: Speed, run: Path | None, load) -> Iterator[Timing]:
    model, weights, cache = asked.model, asked.weights, asked.cache_type
    context, prompt = asked.context_length, asked.prompt_length
    serving = Serving(prompt, context, tuple(sorted(set(asked.batches))), cache)
    for batch, measured in measure_serving(
        _decoder(asked, run), serving, calls=asked.calls, profiled=asked.profiled
    ):
        name, tokens = (f"decode {batch:,}", batch) if batch else (f"prefill {prompt:,}", prompt)
        if batch:
            parts = decode(model, batch, context, weights, load, cache)
        else:
            parts = prefill(model, 1, prompt, weights, load, cache)
        passes = bytes_between_products(model, tokens, training=False)
        yield Timing(
            name, batch or 1, tokens, parts, passes, measured.kernels, measured.seconds, measured.profile
        )


def _decoder(asked: Speed, run: Path | None) -> Decoder:
    """The weights as they are served: those of a run, or random ones."""
    if run is None:
        state = initial_state(asked.model, optax.identity(), seed=asked.seed, average=False)
    else:
        state = restore(run, asked, asked.checkpoint).state
    params = state.evaluated
    if asked.quantize:
        params = quantize_params(params, format_named(asked.quantize), asked.model.dtype)
    return Decoder.of(asked.model, params, state.controllers)
