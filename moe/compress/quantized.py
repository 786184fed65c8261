"""What quantised weights do to a trained run: quality by slice, bytes, speed, and which parts it hurts."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from moe.checkpoint import Restored
from moe.compress import quantized_report
from moe.compress.compare import Answers, compare, make_comparison_step, together
from moe.compress.sensitivity import sensitivity as find_sensitivity
from moe.compress.size import weight_bytes
from moe.compress.speed import Workload, measure_speed
from moe.data import Dataset
from moe.errors import UserError
from moe.experiment import Experiment
from moe.nn import structure
from moe.nn.quantized import quantize_params
from moe.quant import Format, format_named
from moe.training.evaluate import slice_rows
from moe.training.restore import restore
from moe.training.run_directory import read_experiment

SENSITIVITY_TOKENS = 2048  # of each slice, for every layer and every expert again


def measure(
    run: Path,
    experiment: Experiment,
    restored: Restored,
    dataset: Dataset,
    quantize: str,
    *,
    batch_size: int,
    tokens: int,
    sensitivity: bool,
    speed: bool,
) -> dict:
    """What `moe.compress.quantized_report` shows.

    Args:
        run: its directory.
        experiment: the run's.
        restored: its checkpoint.
        dataset: with the validation data.
        quantize: a format's name, or a directory that `moe.compress.calibrate` made of this run.
        batch_size: sequences at once, over all devices.
        tokens: validation tokens of each slice; 0: all.
        sensitivity: measure every layer and expert by itself too.
        speed: measure how fast prompts are read and tokens made.

    Raises:
        UserError: it holds quantised weights already, or `quantize` does not fit it.
    """
    model, state = experiment.model, restored.state
    if experiment.quantization.weights:
        raise UserError(f"{run} is quantised already; evaluate it without --quantize")
    name, format, rounded = quantized_weights(experiment, state.evaluated, quantize)
    step = make_comparison_step(structure(model)[0], chunks=experiment.train.loss_chunks)
    token_bytes = jnp.asarray(dataset.token_bytes)

    def answers(params: nnx.State, slice_: str, tokens: int) -> Answers:
        rows = slice_rows(dataset, slice_, experiment.data, batch_size=batch_size, tokens=tokens or None)
        return compare(step, state.evaluated, params, state.controllers, rows, token_bytes)

    def divergence(params: nnx.State) -> float:
        parts = [answers(params, slice_, tokens or SENSITIVITY_TOKENS) for slice_ in dataset.slices]
        return together(parts).summary()["divergence"]

    return quantized_report.as_dict(
        run=experiment.name,
        step=restored.step,
        name=name,
        slices={slice_: answers(rounded, slice_, tokens) for slice_ in dataset.slices},
        size=(weight_bytes(state.evaluated, model.dtype), weight_bytes(rounded, model.dtype)),
        speed=measure_speed(
            model, (state.evaluated, rounded), state.controllers, Workload.like(experiment.data)
        )
        if speed
        else None,
        sensitivity=find_sensitivity(state.evaluated, format, model, divergence) if sensitivity else None,
    )


def quantized_weights(
    experiment: Experiment, params: nnx.State, quantize: str
) -> tuple[str, Format, nnx.State]:
    """What `quantize` names: its name, its format, and the parameters.

    Raises:
        UserError: a directory that does not hold this run quantised, or a format that does not fit.
    """
    directory = Path(quantize)
    if not directory.is_dir():
        format = format_named(quantize)
        return quantize, format, quantize_params(params, format, experiment.model.dtype)
    other = read_experiment(directory)
    if other.model != experiment.model or not other.quantization.weights:
        raise UserError(f"--quantize {directory} does not hold this run quantised; make it by moe.compress")
    calibrated = restore(directory, other, "last").state.evaluated
    return directory.name, format_named(other.quantization.weights), calibrated
