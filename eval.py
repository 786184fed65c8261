"""Measure a trained run: quality for each slice, expert load, parameters and compute; or look at its routing.

    uv run eval.py runs/quickstart
    uv run eval.py runs/quickstart --checkpoint best --tokens 50000
    uv run eval.py runs/quickstart --quantize int8 --sensitivity
    uv run eval.py runs/quickstart --routing
    uv run eval.py runs/quickstart --trace trace.npz
    uv run eval.py runs/quickstart --baseline runs/quickstart_dense
    uv run eval.py runs/quickstart --tasks arc_easy my_task.yaml
    uv run eval.py runs/quickstart --speed
    uv run eval.py configs/qwen3_30b_a3b.py --compute --hardware h100,v5e --price h100=2.5

Prints tables, and writes report/eval.json and TensorBoard scalars into the run directory; with --quantize
what rounded weights cost and report/quantized-FORMAT.json (docs/quantization.md); with --routing
report/routing.html, its numbers and its pictures; with --trace a file of who went where; with --baseline
report/compare-OTHER.html, both side by side. For a run or a config, --speed measures it here and --compute
says what it costs on chips that need not be here. docs/eval.md and docs/compute.md say more. On several
machines it is the same command on each of them: docs/clusters.md.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax

from moe.analysis.compute import account
from moe.checkpoint import Restored
from moe.compress import quantized, quantized_report
from moe.config import override
from moe.data import prepare
from moe.errors import UserError, run_main
from moe.evaluation import tasks
from moe.evaluation.baseline import compare_with
from moe.evaluation.routes import Run, analyse_routing, trace_routing
from moe.evaluation.speed_command import measure_speed
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from moe.nn import structure
from moe.processes import first, joined
from moe.quant import format_named
from moe.routing import Strategy
from moe.routing.trace import check_writable
from moe.training import report
from moe.training.evaluate import evaluate
from moe.training.prediction import predict_cost
from moe.training.record import check_recordable
from moe.training.restore import restore
from moe.training.run_directory import read_experiment
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
    """With --quantize or --baseline, leave out how fast prompts are read and tokens made."""

    strategy: Strategy | None = None
    """Route in another way than the run did, for example by Replay("trace.npz"); None routes as it did."""

    routing: bool = False
    """Analyse the routing, and how it came about over the checkpoints that the run keeps."""

    baseline: str = ""
    """Compare with the run in this directory, slice by slice, in size, in FLOPs and in speed; with --quantize
    the quantised weights are compared, also with this same run."""

    baseline_checkpoint: str = "last"
    """Of the baseline: `last`, `best` or a step."""

    tasks: tuple[str, ...] = ()
    """Run these tasks of lm-evaluation-harness (extra `tasks`), by name or as files .yaml or .json, on the
    weights that --quantize says."""

    examples: int = 0
    """Most examples of each task; 0 takes all."""

    fewshot: int | None = None
    """Examples shown before each question; None: as the task says."""

    compute: bool = False
    """Predict FLOPs, bytes, memory, time and cost instead, of a run or of a config that was never trained.
    Takes options of its own: eval.py RUN --compute --help."""

    trace: str = ""
    """File (.npz) for who went where, which Replay("FILE") routes by; see moe/routing/trace.py."""

    trace_data: Literal["validation", "train"] = "validation"
    """What to trace: validation data, or the first `tokens` of the training data in the run's own order."""

    def __post_init__(self):
        for name in ("tokens", "batch_size", "examples"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if self.quantize and not Path(self.quantize).is_dir():
            format_named(self.quantize)
        if self.sensitivity and not self.quantize:
            raise UserError("--sensitivity is to a number format; say which, like --quantize int8")
        if self.trace and self.trace_data == "train" and not self.tokens:
            raise UserError("--trace-data train goes on for ever; say how much of it, like --tokens 100000")


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
    if options.tasks:
        tasks.check_tasks(options.tasks)
    if options.baseline:
        read_experiment(Path(options.baseline))

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

    run = Run(directory, experiment, dataset, batch_size, options.tokens)
    if options.routing:
        analyse_routing(run, restored)
    if options.trace:
        trace_routing(run, restored, Path(options.trace), options.trace_data)
    if options.tasks:
        run_on_tasks(run, restored, options)
    if options.baseline:
        other, speed = Path(options.baseline), not options.skip_speed
        compare_with(
            run, restored, other, options.baseline_checkpoint, quantize=options.quantize, speed=speed
        )
    elif options.quantize and not options.tasks:
        measure_quantized(run, restored, options)
    if not (options.routing or options.trace or options.quantize or options.tasks or options.baseline):
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
        tokens=run.tokens or None,
    )
    if not first():
        return
    compute = account(experiment.model, experiment.data.sequence_length)
    found = report.as_dict(experiment, restored.step, evaluation, compute)
    written = report.write(run.directory / "report", found, evaluation)
    report.show(found)
    print(f"written: {written}, and TensorBoard: uv run tensorboard --logdir {run.directory}")


def measure_quantized(run: Run, restored: Restored, options: Options) -> None:
    """What quantised weights cost in quality, and what they save in bytes and time."""
    found = quantized.measure(
        run.directory,
        run.experiment,
        restored,
        run.dataset,
        options.quantize,
        batch_size=run.batch_size,
        tokens=run.tokens,
        sensitivity=options.sensitivity,
        speed=not options.skip_speed,
    )
    if not first():
        return
    written = quantized_report.write(run.directory / "report", found)
    quantized_report.show(found)
    print(f"\nwritten: {written}")


def run_on_tasks(run: Run, restored: Restored, options: Options) -> None:
    """Tasks of lm-evaluation-harness."""
    from moe.evaluation.language_model import checkpoint_of

    experiment, params = run.experiment, restored.state.evaluated
    if options.quantize:
        _, _, params = quantized.quantized_weights(experiment, params, options.quantize)
    checkpoint = checkpoint_of(experiment, params, restored.state.controllers, run.dataset, run.batch_size)
    found = tasks.run_tasks(checkpoint, options.tasks, examples=options.examples, fewshot=options.fewshot)
    found |= {"run": experiment.name, "step": restored.step, "weights": options.quantize or "as they are"}
    tasks.show(found)
    print(f"\nwritten: {tasks.write(run.directory / 'report', found)}")


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
