"""What `eval.py` does with the routes of a run: analyse them, and write them down."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import tokenizers

from moe.analysis import routing
from moe.checkpoint import Restored
from moe.config import to_json
from moe.data import Dataset
from moe.experiment import Experiment
from moe.processes import first
from moe.routing.trace import write_trace
from moe.training.record import Batch, make_record_step, record, training_rows, validation_rows
from moe.training.restore import restore, steps_before
from moe.training.state import TrainState


class Run(NamedTuple):
    """A trained run, and how much of its data to look at."""

    directory: Path
    experiment: Experiment
    dataset: Dataset

    batch_size: int
    """Sequences at once, over all devices."""

    tokens: int
    """Of each slice; 0: all."""


def analyse_routing(run: Run, restored: Restored) -> None:
    """Who goes where on the validation data, at this checkpoint and at those before it."""
    directory, experiment = run.directory, run.experiment
    step = make_record_step(experiment.model, chunks=experiment.train.loss_chunks)
    final = _recorded(run, step, restored.state, _validation(run))
    saturation = {}
    for earlier in steps_before(directory, experiment, restored.step):
        state = restore(directory, experiment, str(earlier)).state
        expert = _recorded(run, step, state, _validation(run)).expert
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


def trace_routing(run: Run, restored: Restored, path: Path, data: Literal["validation", "train"]) -> None:
    """Who goes where, into a file.

    Args:
        run: whose tokens count over all slices where training data are traced.
        restored: its checkpoint.
        path: of the file.
        data: that are routed.
    """
    experiment = run.experiment
    if data == "train":
        batches = training_rows(experiment, run.dataset, batch_size=run.batch_size, tokens=run.tokens)
    else:
        batches = _validation(run)
    step = make_record_step(experiment.model, chunks=experiment.train.loss_chunks)
    found = _recorded(run, step, restored.state, batches)
    if not first():
        return
    config = json.loads(to_json(experiment))
    strategy = config["model"]["moe"]["routing"]
    metadata = {"run": experiment.name, "step": restored.step, "data": data}
    metadata |= {"strategy": strategy, "config": config}
    sequences = write_trace(
        path, found.token_id, found.expert, found.combine_weight, found.num_experts, metadata, found.mask
    )
    _, layers, length, experts = found.expert.shape
    print(
        f"written: {path}, {path.stat().st_size / 1e6:.1f} MB: {sequences:,} sequences of {length} tokens, "
        f"{layers} MoE layers, up to {experts} of {found.num_experts} experts a token"
    )


def _validation(run: Run) -> Iterator[Batch]:
    """The validation data that was asked for."""
    return validation_rows(run.experiment, run.dataset, batch_size=run.batch_size, tokens=run.tokens or None)


def _recorded(run: Run, step, state: TrainState, batches: Iterator[Batch]) -> routing.Recording:
    """The routing of some batches at a checkpoint."""
    return record(
        step,
        state.evaluated,
        state.controllers,
        batches,
        num_experts=run.experiment.model.moe.num_choices,
        slices=run.dataset.slices,
    )
