"""Quantise a trained run by what really enters its matrices, and write a run directory that holds the result.

    python -m moe.compress.calibrate runs/quickstart --format int4
    python -m moe.compress.calibrate runs/quickstart --format int4-64 --tokens 200000 --out runs/quickstart-64

Every matrix is rounded by GPTQ (2210.17323) on the training data's first tokens, with all second moments
taken from the model as it was trained. An expert is calibrated by the tokens that are routed to it, and
besides by others drawn at random from all tokens, which weigh as much as that expert's matrices have inputs:
with many tokens of its own an expert is rounded for those, a rarely used one for what it might be sent.

`uv run eval.py` measures the directory like any run, and `uv run eval.py RUN --quantize DIRECTORY` beside the
run that it was made from.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import track

from moe.checkpoint import CheckpointStore
from moe.compress import moments
from moe.compress.gptq import gptq
from moe.compress.moments import Moments, make_moment_step
from moe.compress.visits import Visits
from moe.config import override
from moe.data import Dataset, prepare
from moe.errors import UserError, run_main
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from moe.nn import MoEConfig, TransformerConfig, structure
from moe.nn.quantized import format_of, quantize_params
from moe.quant import Format, Quantization, QuantizedMatrix, format_named
from moe.routing import Blending
from moe.training.record import training_rows
from moe.training.restore import restore
from moe.training.run_directory import claimed, read_experiment
from moe.training.state import TrainState


@dataclass(frozen=True)
class Options:
    """How to quantise."""

    format: str = "int4"
    """int8, int8-dynamic, int4 or fp8; with a group size int4-128."""

    tokens: int = 65_536
    """Training tokens to calibrate with."""

    batch_size: int = 0
    """Sequences at once, over all devices; 0 takes the training run's micro-batch."""

    out: str = ""
    """Directory to write; by default the run's with the format behind its name."""

    def __post_init__(self):
        format_named(self.format)
        if self.tokens < 1:
            raise UserError(f"tokens={self.tokens} must be at least 1")


def main() -> None:
    """Read the command line, calibrate, write."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("give a run directory first: python -m moe.compress.calibrate runs/quickstart")
    directory = Path(sys.argv[1])
    options = override(Options(), sys.argv[2:], prog=f"calibrate {directory}", description=__doc__ or "")
    out = Path(options.out or f"{directory}-{options.format}")
    experiment = read_experiment(directory)
    if experiment.quantization.weights:
        raise UserError(f"{directory} is quantised to {experiment.quantization.weights} already")

    jax.set_mesh(make_mesh(MeshConfig()))
    micro = experiment.train.batch_size // experiment.train.accumulation
    batch_size = options.batch_size or -(-micro // jax.device_count()) * jax.device_count()
    experiment.check_sharding(MeshConfig(), jax.device_count(), batch_size)
    dataset = prepare(experiment.data)
    experiment.check_vocabulary(dataset.vocab_size)
    step, state, position = restore(directory, experiment, "last")

    written = replace(experiment, name=out.name, quantization=Quantization(weights=options.format))
    with claimed(out, written), CheckpointStore(out / "checkpoints", written.checkpoints) as store:
        if store.steps():
            raise UserError(f"{out} holds quantised weights already; remove it, or give another --out")
        params = calibrate(experiment, state, dataset, options, batch_size)
        store.save(step, replace(state, params=params, average=None), position, wait=True)
    print(f"written: {out}\nnext  uv run eval.py {directory} --quantize {out}")


def calibrate(
    experiment: Experiment, state: TrainState, dataset: Dataset, options: Options, batch_size: int
) -> nnx.State:
    """The parameters quantised to `options.format`."""
    model, params, format = experiment.model, state.evaluated, format_named(options.format)

    def measured(model: TransformerConfig) -> Moments:
        rows = training_rows(experiment, dataset, batch_size=batch_size, tokens=options.tokens)
        step = make_moment_step(structure(model)[0], model.dtype, chunks=experiment.train.loss_chunks)
        batches = options.tokens // experiment.data.sequence_length / batch_size
        shown = track(rows, "second moments", total=math.ceil(batches), console=Console(stderr=True))
        return moments.measure(step, params, state.controllers, shown)

    own = measured(model)
    routed = model.moe_layers and not isinstance(model.moe.routing, Blending)
    visited = measured(replace(model, moe=_visited(model.moe))) if routed else own
    found = with_visits(own, visited, options.tokens / model.moe.num_choices)
    return round_by(params, found, format, model.dtype)


def round_by(params: nnx.State, found: Moments, format: Format, dtype: jnp.dtype) -> nnx.State:
    """Parameters with every matrix rounded by GPTQ; laid out as `quantize_params` does."""
    unrounded = dict(nnx.to_flat_state(params))

    def one(path: tuple, nearest: nnx.Variable) -> nnx.Variable:
        own = format_of(unrounded[path], format)
        if own is None:
            return nearest

        def rounded(w, moment):
            return QuantizedMatrix.of_codes(*gptq(w, moment, own), own)

        layout = jax.tree.map(lambda x: x.sharding.spec, nearest.get_value())
        laid_out = jax.sharding.auto_axes(rounded, out_sharding=layout)
        return nearest.replace(jax.jit(laid_out)(unrounded[path][...], found[path]))

    nearest = nnx.to_flat_state(quantize_params(params, format, dtype))
    return nnx.from_flat_state([(path, one(path, variable)) for path, variable in nearest])


def with_visits(own: Moments, both: Moments, visits: float) -> Moments:
    """Moments in which the visits to each expert weigh as much as its matrix has inputs.

    Args:
        own: of the tokens that were routed to each expert.
        both: of those and of the visits.
        visits: tokens that visited each expert.
    """
    return jax.tree.map(lambda a, b: a + a.shape[-1] / visits * (b - a), own, both)


def _visited(moe: MoEConfig) -> MoEConfig:
    return replace(moe, dispatch=Visits(of=moe.dispatch))


if __name__ == "__main__":
    run_main(main)
