"""The model card of an export: what the model is, how large, how good, and how to serve it."""

import json
from pathlib import Path

from moe.analysis.compute import account
from moe.experiment import Experiment
from moe.export.architecture import ABSENT, Architecture
from moe.export.serving import Engine, told

Quality = dict[str, dict[str, float]]
"""For each slice of the validation data, and for `all`, loss and bits per byte; may be empty."""


def model_card(
    experiment: Experiment,
    architecture: Architecture,
    *,
    step: int,
    averaged: bool,
    quality: Quality,
    quantized: str = "",
    engines: tuple[Engine, ...],
    path: Path,
) -> str:
    """README.md of an export.

    Args:
        experiment: the run's.
        architecture: that carries it.
        step: of the checkpoint.
        averaged: whether the weights are the moving average.
        quality: what was measured.
        quantized: name of the format of its matrices; "" where they are not quantised.
        engines: that load it.
        path: of the export.
    """
    model, data = experiment.model, experiment.data
    compute = account(model, data.sequence_length)
    trained = step * experiment.train.batch_size * data.sequence_length
    facts = {
        "architecture": f"`{architecture.class_name}`",
        "total parameters": f"{compute.total_params:,}",
        "active parameters": f"{compute.active_params:,.0f} a token",
        "layers": f"`{model.layers}` (D dense, M mixture of experts)",
        "vocabulary": f"{model.vocab_size:,}",
        "trained on": f"{trained:,} tokens in sequences of {data.sequence_length:,}",
        "weights": f"{'moving average' if averaged else 'last'} at step {step:,}",
    }
    if quantized:
        facts["matrices"] = f"`{quantized}`, in the layout of compressed-tensors; rounded to the nearest"
    if model.moe_layers:
        moe = model.moe
        facts["experts"] = f"{moe.num_experts} a layer, routed by `{moe.routing}`"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# {experiment.name}", "", "A sparse language model trained with Switchyard.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    if absent := architecture.config(model).get(ABSENT):
        lines += [
            f"Parts that this architecture always has and the model has not are zeros: {', '.join(absent)}.",
            "",
        ]
    lines += ["## Validation" + ", before quantising" * bool(quantized), ""]
    if quality:
        lines += ["| slice | loss (nats a token) | bits per byte |", "|---|---|---|"]
        lines += [
            f"| {name} | {found['loss']:.4f} | {found['bits_per_byte']:.4f} |"
            for name, found in quality.items()
        ]
    else:
        lines += ["This run was not evaluated."]
    lines += ["", "## Serving", "", "```", *told(engines, path), "```", ""]
    return "\n".join(lines)


def evaluation(directory: Path, step: int) -> Quality:
    """What `eval.py`, or else the run itself, measured at a step: loss and bits per byte of each slice."""
    report = directory / "report" / "eval.json"
    if report.is_file():
        found = json.loads(report.read_text())
        if found["step"] == step:
            return {**found["slices"], "all": found["total"]}
    quality: Quality = {}
    metrics = directory / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        scalars = json.loads(line)
        if scalars["step"] == step:
            for name, value in scalars.items():
                _, _, rest = name.partition("validation/")
                kind, _, slice_name = rest.partition("/")
                if kind in ("loss", "bits_per_byte"):
                    quality.setdefault(slice_name or "all", {})[kind] = value
    return quality
