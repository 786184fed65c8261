"""Measure a trained run: quality for each slice, expert load, parameters and compute; or look at its routing.

    uv run eval.py runs/quickstart
    uv run eval.py runs/quickstart --checkpoint best --tokens 50000
    uv run eval.py runs/quickstart --quantize int8 --sensitivity
    uv run eval.py runs/quickstart --routing
    uv run eval.py runs/quickstart --trace trace.npz
    uv run eval.py configs/qwen3_30b_a3b.py --compute --hardware h100,v5e --price h100=2.5

Prints tables, and writes report/eval.json and TensorBoard scalars into the run directory; with --quantize
what rounded weights cost and report/quantized-FORMAT.json (docs/quantization.md); with --routing
report/routing.html, its numbers and its pictures; with --trace a file of who went where; with --compute, for
a run or a config, what it costs on chips that need not be here (docs/compute.md). On several machines it is
the same command on each of them: docs/clusters.md.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import tokenizers

from moe.analysis import routing
from moe.analysis.compute import account
from moe.checkpoint import Restored
from moe.compress import quantized, quantized_report
from moe.config import override, to_json
from moe.data import Dataset, prepare
from moe.errors import UserError, run_main
from moe.evaluation.speed_command import measure_speed
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from moe.nn import structure
from moe.processes import first, joined
from moe.quant import format_named
from moe.routing import Strategy
from moe.routing.trace import check_writable, write_trace
from moe.training import report
from moe.training.evaluate import evaluate
from moe.training.prediction import predict_cost
from moe.training.record import (
    Batch,
    check_recordable,
    make_record_step,
    record,
    training_rows,
    validation_rows,
)
from moe.training.restore import restore, steps_before
from moe.training.run_directory import read_experiment
from moe.training.state import TrainState
from moe.training.step import make_eval_step


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    checkpoint: str = "last"
    """`last`, `best` (lowest validation loss while training) or a step."""

    tokens: int = 0
    """Validation tokens of each slice, spread over it; 0 takes all."""

    batch_size: int = 0
    """Sequences at once, over all devices; 0 takes the training run's micro-batch."""

    expert: int = 1
    """Devices along the mesh's `expert` axis; the rest lie along `data`."""

    quantize: str = ""
    """Measure what quantised weights cost: int8, int8-dynamic (activations too), int4 or fp8, with a group
    size int4-128; or those in a directory that `moe.compress.calibrate` made of this run."""

    sensitivity: bool = False
    """With --quantize, which layers and which experts suffer most."""

    skip_speed: bool = False
    """With --quantize, leave out how fast prompts are read and tokens made."""

    strategy: Strategy | None = None
    """Route in another way than the run did, for example by Replay("trace.npz"); None routes as it did."""

    routing: bool = False
    """Analyse the routing, and how it came about over the checkpoints that the run keeps."""

    compute: bool = False
    """Predict FLOPs, bytes, memory, time and cost instead, of a run or of a config that was never trained.
    Takes options of its own: eval.py RUN --compute --help."""

    trace: str = ""
    """File (.npz) for who went where, which Replay("FILE") routes by; see moe/routing/trace.py."""

    trace_data: Literal["validation", "train"] = "validation"
    """What to trace: validation data, or the first `tokens` of the training data in the run's own order."""

    def __post_init__(self):
        for name in ("tokens", "batch_size"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if self.quantize and not Path(self.quantize).is_dir():
            format_named(self.quantize)
        if self.sensitivity and not self.quantize:
            raise UserError("--sensitivity is to a number format; say which, like --quantize int8")
        if self.trace and self.trace_data == "train" and not self.tokens:
            raise UserError("--trace-data train goes on for ever; say how much of it, like --tokens 100000")


class Run(NamedTuple):
    """A trained run, and how to look at it."""

    directory: Path
    experiment: Experiment
    options: Options
    dataset: Dataset
    batch_size: int


def main() -> None:
    """Read the command line, measure, tell."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("give a run directory first, for example: uv run eval.py runs/quickstart")
    if "--compute" in sys.argv[2:]:
        predict_cost(sys.argv[1], sys.argv[2:])
        return
    if "--speed" in sys.argv[2:]:
        measure_speed(sys.argv[1], sys.argv[2:])
        return
    directory = Path(sys.argv[1])
    options = override(Options(), sys.argv[2:], prog=f"eval.py {directory}", description=__doc__ or "")
    with joined():
        evaluate_run(directory, options)


def evaluate_run(directory: Path, options: Options) -> None:
    """Measure the run, or look at its routing."""
    experiment = rerouted(read_experiment(directory), options.strategy)
    if options.routing or options.trace:
        check_recordable(experiment.model)
    if options.trace and first():
        check_writable(Path(options.trace))

    mesh = MeshConfig(expert=options.expert)
    jax.set_mesh(make_mesh(mesh))
    batch_size = rows(options, experiment)
    experiment.check_sharding(mesh, jax.device_count(), batch_size)
    restored = restore(directory, experiment, options.checkpoint)
    dataset = prepare(experiment.data)
    experiment.check_vocabulary(dataset.vocab_size)
    if first() and restored.position["dataset"] != dataset.fingerprint:
        print("note: the text or the tokenizer has changed since this run was trained", file=sys.stderr)

    if first() and (goal := experiment.quantization.train) and not options.quantize:
        print(f"note: this run was trained for {goal} weights; --quantize {goal} takes them", file=sys.stderr)

    run = Run(directory, experiment, options, dataset, batch_size)
    if options.routing:
        analyse_routing(run, restored)
    if options.trace:
        trace(run, restored)
    if options.quantize:
        measure_quantized(run, restored)
    if not (options.routing or options.trace or options.quantize):
        measure(run, restored)


def measure(run: Run, restored: Restored) -> None:
    """Quality, expert load and compute."""
    experiment = run.experiment
    for what in experiment.model.looks_ahead if first() else ():
        print(f"note: {what} lets tokens see later ones: the losses may be too good", file=sys.stderr)
    graph, _ = structure(experiment.model)
    evaluation = evaluate(
        make_eval_step(graph, chunks=experiment.train.loss_chunks),
        restored.state.evaluated,
        restored.state.controllers,
        run.dataset,
        experiment.data,
        batch_size=run.batch_size,
        tokens=run.options.tokens or None,
    )
    if not first():
        return
    compute = account(experiment.model, experiment.data.sequence_length)
    found = report.as_dict(experiment, restored.step, evaluation, compute)
    written = report.write(run.directory / "report", found, evaluation)
    report.show(found)
    print(f"written: {written}, and TensorBoard: uv run tensorboard --logdir {run.directory}")


def measure_quantized(run: Run, restored: Restored) -> None:
    """What quantised weights cost in quality, and what they save in bytes and time."""
    options = run.options
    found = quantized.measure(
        run.directory,
        run.experiment,
        restored,
        run.dataset,
        options.quantize,
        batch_size=run.batch_size,
        tokens=options.tokens,
        sensitivity=options.sensitivity,
        speed=not options.skip_speed,
    )
    if not first():
        return
    written = quantized_report.write(run.directory / "report", found)
    quantized_report.show(found)
    print(f"\nwritten: {written}")


def analyse_routing(run: Run, restored: Restored) -> None:
    """Who goes where on the validation data, at this checkpoint and at those before it."""
    directory, experiment = run.directory, run.experiment
    step = make_record_step(experiment.model, chunks=experiment.train.loss_chunks)
    final = recorded(run, step, restored.state, validation(run))
    saturation = {}
    for earlier in steps_before(directory, experiment, restored.step):
        state = restore(directory, experiment, str(earlier)).state
        expert = recorded(run, step, state, validation(run)).expert
        saturation[earlier] = routing.saturation(expert, final.expert, final.mask, final.num_experts)

    if not first():
        return
    found = routing.analyse(final, run=experiment.name, step=restored.step, saturation=saturation)
    tokenizer = tokenizers.Tokenizer.from_file(str(run.dataset.tokenizer))
    paths = routing.write_report(
        found, directory / "report", lambda id_: tokenizer.decode([id_], skip_special_tokens=False)
    )
    routing.show(found)
    print("written:", *paths, sep="\n  ")


def trace(run: Run, restored: Restored) -> None:
    """Who goes where, into a file."""
    experiment, options, path = run.experiment, run.options, Path(run.options.trace)
    if options.trace_data == "train":
        batches = training_rows(experiment, run.dataset, batch_size=run.batch_size, tokens=options.tokens)
    else:
        batches = validation(run)
    step = make_record_step(experiment.model, chunks=experiment.train.loss_chunks)
    found = recorded(run, step, restored.state, batches)
    if not first():
        return
    config = json.loads(to_json(experiment))
    strategy = config["model"]["moe"]["routing"]
    metadata = {"run": experiment.name, "step": restored.step, "data": options.trace_data}
    metadata |= {"strategy": strategy, "config": config}
    sequences = write_trace(
        path, found.token_id, found.expert, found.combine_weight, found.num_experts, metadata, found.mask
    )
    _, layers, length, experts = found.expert.shape
    print(
        f"written: {path}, {path.stat().st_size / 1e6:.1f} MB: {sequences:,} sequences of {length} tokens, "
        f"{layers} MoE layers, up to {experts} of {found.num_experts} experts a token"
    )


def validation(run: Run) -> Iterator[Batch]:
    """The validation data that was asked for."""
    tokens = run.options.tokens or None
    return validation_rows(run.experiment, run.dataset, batch_size=run.batch_size, tokens=tokens)


def recorded(run: Run, step, state: TrainState, batches: Iterator[Batch]) -> routing.Recording:
    """The routing of some batches at a checkpoint."""
    return record(
        step,
        state.evaluated,
        state.controllers,
        batches,
        num_experts=run.experiment.model.moe.num_choices,
        slices=run.dataset.slices,
    )


def rows(options: Options, experiment: Experiment) -> int:
    """Sequences at once: what was asked for, else the training micro-batch, made to fit the devices."""
    devices = jax.device_count()
    if options.batch_size % devices:
        raise UserError(f"--batch-size {options.batch_size} does not divide among {devices} devices")
    micro = experiment.train.batch_size // experiment.train.accumulation
    return options.batch_size or -(-micro // devices) * devices


def rerouted(experiment: Experiment, strategy: Strategy | None) -> Experiment:
    """The experiment with another strategy, if one was asked for."""
    if strategy is None:
        return experiment
    moe = replace(experiment.model.moe, routing=strategy)
    return replace(experiment, model=replace(experiment.model, moe=moe))


if __name__ == "__main__":
    run_main(main)
