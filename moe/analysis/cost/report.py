"""All that can be said of a model's cost without running it, as numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from moe.analysis.compute import NOTHING, by_component
from moe.analysis.cost.matrices import Tokens, matrices, touched, weight_bytes
from moe.analysis.cost.memory import (
    TrainingMemory,
    serving_memory,
    training_memory,
    weights_memory,
)
from moe.analysis.cost.passes import SCORES, Parts, decode, kv_bytes, prefill, total, train_step
from moe.analysis.cost.roofline import Timed, Workload, timed
from moe.analysis.hardware import Hardware
from moe.nn import TransformerConfig
from moe.optim import Optimizer

SERVED = ("bf16", "int8", "int4")  # formats whose memory is always told


@dataclass(frozen=True)
class Setup:
    """A model, how it is trained and how it is served."""

    name: str
    model: TransformerConfig
    optimizer: Optimizer

    sequence_length: int
    """In training."""

    batch_size: int
    """Sequences of a step."""

    accumulation: int
    """Micro-batches of a step."""

    loss_chunks: int
    """Parts in which the loss is made."""

    average: bool
    """Whether a moving average of the parameters is kept."""

    context: int
    """Tokens of a prompt, and those that a decoded token attends to."""

    batches: tuple[int, ...]
    """Sequences that are decoded together."""

    weights: str
    """As they are served, see `Matrices.stored`."""

    cache: str
    """Type of keys and values, see `kv_bytes`."""

    load: Float[ndarray, "L E"] | None = None
    """Measured, see `Tokens`; None: even."""


@dataclass(frozen=True)
class CostReport:
    """What a setup costs."""

    setup: Setup
    training: TrainingMemory
    workloads: tuple[Workload, ...]
    """A train step, a prompt, and a decoded token at each batch size; models that look ahead only train."""

    times: Mapping[Hardware, tuple[Timed, ...]]
    """Of the workloads, in their order."""


def predict(
    setup: Setup, hardware: list[Hardware], prices: Mapping[str, float], chips: int = 0
) -> CostReport:
    """Account for a setup, and time it on every hardware.

    Args:
        setup: what is trained and served.
        hardware: on what.
        prices: dollars for an hour of a chip, by name, where they are known.
        chips: that share each workload; 0 takes the fewest that hold it.
    """
    model, length, context = setup.model, setup.sequence_length, setup.context
    tokens = setup.batch_size * length
    memory = training_memory(
        model,
        setup.optimizer,
        tokens=tokens // setup.accumulation,
        length=length,
        accumulation=setup.accumulation,
        loss_chunks=setup.loss_chunks,
        average=setup.average,
    )
    step = train_step(
        model, setup.batch_size, length, accumulation=setup.accumulation, state_bytes=memory.state
    )
    workloads = [Workload("train step", tokens, step, memory.total)]
    if not model.looks_ahead:
        served = (setup.weights, setup.load, setup.cache)
        workloads.append(
            Workload(
                f"prefill {context:,}",
                context,
                prefill(model, 1, context, *served),
                serving_memory(model, setup.weights, 1, context, setup.cache),
            )
        )
        workloads += [
            Workload(
                f"decode {batch:,}",
                batch,
                decode(model, batch, context, *served),
                serving_memory(model, setup.weights, batch, context, setup.cache),
            )
            for batch in setup.batches
        ]
    times = {
        chip: tuple(timed(workload, chip, chips, prices.get(chip.name)) for workload in workloads)
        for chip in hardware
    }
    return CostReport(setup, memory, tuple(workloads), times)


def as_dict(report: CostReport) -> dict[str, Any]:
    """As JSON holds it."""
    setup, model = report.setup, report.setup.model
    parts = by_component(model, setup.sequence_length)
    whole = sum(parts.values(), NOTHING)
    return {
        "name": setup.name,
        "sequence_length": setup.sequence_length,
        "context": setup.context,
        "weights": setup.weights,
        "cache": setup.cache,
        "load": "even" if setup.load is None else "measured",
        "looks_ahead": model.looks_ahead,
        "total_params": whole.total_params,
        "active_params": whole.active_params,
        "embedding_params": embedding_params(report),
        "parts": flops_by_part(report),
        "decode": [decoded(setup, batch) for batch in setup.batches if not model.looks_ahead],
        "memory": {
            "train": asdict(report.training) | {"total": report.training.total},
            "serve": {weights: weights_memory(model, weights) for weights in SERVED},
            "cache_of_a_sequence": kv_bytes(model, setup.context, setup.cache),
        },
        "workloads": [
            {
                "name": w.name,
                "tokens": w.tokens,
                "flops": w.work.flops,
                "bytes": w.work.bytes,
                "intensity": w.work.intensity,
                "memory": w.memory,
            }
            for w in report.workloads
        ],
        "hardware": {
            chip.name: asdict(chip)
            | {
                "times": {
                    w.name: asdict(t) | {"bound": t.bound}
                    for w, t in zip(report.workloads, times, strict=True)
                }
            }
            for chip, times in report.times.items()
        },
    }


def embedding_params(report: CostReport) -> int:
    """Parameters of the vocabulary: embedding and head, which what is left of a model is compared without."""
    parts = by_component(report.setup.model, report.setup.sequence_length)
    return sum(parts[name].total_params for name in ("embedding", "head") if name in parts)


def flops_by_part(report: CostReport) -> dict[str, dict[str, float]]:
    """Parameters of each part, and FLOPs of one token in it; reading a prompt by its mean over the prompt."""
    setup = report.setup
    found: dict[str, dict[str, float]] = {
        name: {
            "total_params": part.total_params,
            "active_params": part.active_params,
            "forward": part.forward_flops,
            "training": part.training_flops,
        }
        for name, part in by_component(setup.model, setup.sequence_length).items()
    }
    if not setup.model.looks_ahead:
        read = _with_scores(prefill(setup.model, 1, setup.context))
        made = _with_scores(decode(setup.model, 1, setup.context))
        for name, part in found.items():
            part |= {"prefill": read[name].flops / setup.context, "decode": made[name].flops}
    return found


def _with_scores(parts: Parts) -> Parts:
    """With attention's scores among its projections, as `by_component` has them."""
    return parts | {"attention": parts["attention"] + parts[SCORES]}


def decoded(setup: Setup, batch: int) -> dict[str, float | None]:
    """What one decoded token of each of `batch` sequences moves."""
    model, tokens = setup.model, Tokens(batch, setup.context, setup.load)
    found = matrices(model)
    work = total(decode(model, batch, setup.context, setup.weights, setup.load, setup.cache))
    routed = [m for m in found if m.experts]
    # Gate, up and down of an expert are touched together.
    experts_once = {(m.layers, m.experts): m for m in routed}.values()
    visited = sum(sum(touched(model, m, tokens)) for m in experts_once)
    cache = batch * kv_bytes(model, setup.context, setup.cache)
    experts = sum(weight_bytes(model, m, tokens, setup.weights) for m in routed)
    return {
        "batch": batch,
        "experts_touched": visited / model.moe_layers if model.moe_layers else None,
        "expert_bytes": experts,
        "other_weight_bytes": sum(weight_bytes(model, m, tokens, setup.weights) for m in found) - experts,
        "cache_bytes": cache,
        "flops": work.flops,
        "bytes": work.bytes,
        "bytes_per_token": work.bytes / batch,
        "intensity": work.intensity,
    }
