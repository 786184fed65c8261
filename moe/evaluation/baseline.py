"""`eval.py RUN --baseline OTHER`: a run beside another, or beside itself before it was quantised."""

from pathlib import Path

import jax

from moe.checkpoint import Restored
from moe.compress.quantized import quantized_weights
from moe.data import Dataset, prepare
from moe.errors import UserError
from moe.evaluation import comparison_report
from moe.evaluation.comparison import Side, compare
from moe.evaluation.routes import Run
from moe.experiment import Experiment
from moe.training.restore import restore
from moe.training.run_directory import read_experiment


def compare_with(
    run: Run, restored: Restored, other: Path, checkpoint: str, *, quantize: str, speed: bool
) -> None:
    """Print both side by side, and keep it in the run's report/: compare-OTHER.json and compare-OTHER.html.

    Args:
        run: what is compared.
        restored: its checkpoint.
        other: directory of the baseline.
        checkpoint: of the baseline.
        quantize: what the run is quantised to, as `quantized_weights` takes it; "": as it is.
        speed: measure how fast prompts are read and tokens made.

    Raises:
        UserError: the baseline cannot be read, or shares no slice of data.
    """
    if jax.process_count() > 1:
        raise UserError("--baseline is compared by a single process")
    baseline = read_experiment(other)
    before = _side(baseline, restore(other, baseline, checkpoint), prepare(baseline.data))
    after = _side(run.experiment, restored, run.dataset, quantize)
    found = compare((before, after), batch_size=run.batch_size, tokens=run.tokens, speed=speed)
    print(comparison_report.text(found))
    print("written:", *comparison_report.write(run.directory / "report", found), sep="\n  ")


def _side(experiment: Experiment, restored: Restored, dataset: Dataset, quantize: str = "") -> Side:
    params = restored.state.evaluated
    plain = "f32" if experiment.model.compute_dtype == "float32" else "bf16"
    weights = experiment.quantization.weights or plain
    if quantize:
        if experiment.quantization.weights:
            raise UserError("--quantize is for runs that are not quantised already")
        _, _, params = quantized_weights(experiment, params, quantize)
        weights = quantize if not Path(quantize).is_dir() else _format_of(Path(quantize))
    return Side(experiment, restored.step, params, restored.state.controllers, dataset, weights)


def _format_of(directory: Path) -> str:
    return read_experiment(directory).quantization.weights
