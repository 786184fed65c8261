"""Two models side by side: what each knows, holds, computes and takes, and where the second is worse."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe.ablation.statistics import t_interval
from moe.analysis.compute import account
from moe.analysis.cost.passes import decode, kv_bytes, total
from moe.compress.size import weight_bytes
from moe.data import Dataset
from moe.decode import Decoder
from moe.errors import UserError
from moe.evaluation.serving import Serving, measure_serving
from moe.experiment import Experiment
from moe.mesh import spec
from moe.nn import structure
from moe.training.evaluate import slice_rows, to_devices
from moe.training.loss import evaluation_parts

Verdict = Literal["better", "worse", "same", "not tested"]

BATCHES = (1, 8)  # sequences that are decoded together, on each device
CALLS = 24
NOTED, SLOWER = 1.01, 1.05  # how much more a cost, and how much longer a time must be to be called worse

RULE = (
    "Quality is worse or better where the 95 % t-interval of the paired difference over sequences leaves out "
    "0; a cost where it differs by more than 1 %; a time where the median is 5 % longer than the "
    "baseline's and longer than its 90th percentile."
)


@dataclass(frozen=True)
class Side:
    """A checkpoint to compare."""

    experiment: Experiment
    step: int
    params: nnx.State
    """As they are evaluated and served, quantised or not."""

    controllers: nnx.State
    dataset: Dataset
    weights: str
    """Format of the weights, as predictions name it."""

    @property
    def name(self) -> str:
        """What tables call it."""
        plain = self.weights in ("bf16", "f32")
        return self.experiment.name + ("" if plain else f" in {self.weights}")

    @property
    def cache(self) -> Any:
        """How keys and values are stored."""
        return "bfloat16" if self.experiment.model.compute_dtype == "bfloat16" else "float32"


@dataclass(frozen=True)
class Answers:
    """Sums over each sequence of a slice, float64 [sequences]."""

    nll: np.ndarray
    """Negative log-likelihood of its targets, nats."""

    targets: np.ndarray
    text_bytes: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """Over all of them."""
        return float(self.nll.sum() / math.log(2) / self.text_bytes.sum())

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / self.targets.sum())


def answers(side: Side, *, batch_size: int, tokens: int) -> dict[str, Answers]:
    """What a side makes of its validation data, slice by slice.

    Args:
        side: the checkpoint.
        batch_size: sequences at once, over all devices.
        tokens: of each slice; 0: all.
    """
    experiment, dataset = side.experiment, side.dataset
    graph, _ = structure(experiment.model)

    @jax.jit
    def step(params, controllers, tokens, weight, token_bytes):
        model = nnx.merge(graph, params, controllers)
        parts = evaluation_parts(model, tokens, weight, chunks=experiment.train.loss_chunks)
        text_bytes = token_bytes.at[tokens[:, 1:]].get(out_sharding=spec("batch"))
        sums = {"nll": parts.nll, "targets": parts.targets, "text_bytes": (text_bytes * weight).sum(1)}
        return jax.tree.map(lambda x: jax.sharding.reshard(x, spec()), sums)

    token_bytes, found = jnp.asarray(dataset.token_bytes), {}
    for name in dataset.slices:
        parts = []
        rows = slice_rows(dataset, name, experiment.data, batch_size=batch_size, tokens=tokens or None)
        for batch in rows:
            arrays = (to_devices(batch["tokens"]), to_devices(batch["weight"]))
            sums = jax.device_get(step(side.params, side.controllers, *arrays, token_bytes))
            real = sums["targets"] > 0
            parts.append({kind: np.float64(values[real]) for kind, values in sums.items()})
        found[name] = Answers(**{k: np.concatenate([part[k] for part in parts]) for k in parts[0]})
    return found


def compare(sides: tuple[Side, Side], *, batch_size: int, tokens: int, speed: bool) -> dict[str, Any]:
    """Everything about both, as JSON holds it.

    Args:
        sides: the baseline, and what is compared with it.
        batch_size: sequences at once, over all devices.
        tokens: of each slice; 0: all.
        speed: measure how fast prompts are read and tokens made.

    Raises:
        UserError: they have no slice in common.
    """
    before, after = (answers(side, batch_size=batch_size, tokens=tokens) for side in sides)
    common = [name for name in after if name in before]
    if not common:
        raise UserError(f"--baseline: slices {', '.join(before)} are none of {', '.join(after)}")
    lengths = {side.experiment.data.sequence_length for side in sides}
    paired = len(lengths) == 1 and sides[0].dataset.fingerprint == sides[1].dataset.fingerprint
    slices = {name: quality(before[name], after[name], paired) for name in common}
    slices["all"] = quality(_together(before, common), _together(after, common), paired)
    measured = [cost(*each) for each in zip(*map(costs, sides), strict=True)]
    told: str | list[dict[str, Any]] = "left out"
    if speed:
        looking = [side.experiment.model.looks_ahead for side in sides]
        told = next((what[0] + " lets tokens see later ones" for what in looking if what), "") or [
            time_of(*each) for each in zip(*map(times, sides), strict=True)
        ]
    rows = [*measured, *(told if isinstance(told, list) else [])]
    return {
        "sides": [
            {
                "name": side.name,
                "step": side.step,
                "tokens_trained": side.step
                * side.experiment.train.batch_size
                * side.experiment.data.sequence_length,
            }
            for side in sides
        ],
        "rule": RULE,
        "same_data": paired,
        "slices": slices,
        "costs": measured,
        "speed": told,
        "regressions": [f"bits per byte of {name}" for name, q in slices.items() if q["verdict"] == "worse"]
        + [row["name"] for row in rows if row["verdict"] == "worse"],
    }


def quality(before: Answers, after: Answers, paired: bool) -> dict[str, Any]:
    """A slice: bits per byte of both, and the difference with its interval where sequences are the same."""
    difference = after.bits_per_byte - before.bits_per_byte
    low = high = math.nan
    verdict: Verdict = "not tested"
    if paired:
        scale = math.log(2) * before.text_bytes.mean()
        interval = t_interval(((after.nll - before.nll) / scale).tolist())
        low, high = interval.low, interval.high
        verdict = "worse" if low > 0 else "better" if high < 0 else "same"
    return {
        "before": before.bits_per_byte,
        "after": after.bits_per_byte,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "difference": difference,
        "low": low,
        "high": high,
        "sequences": len(after.nll),
        "verdict": verdict,
    }


def costs(side: Side) -> list[tuple[str, float]]:
    """What a side holds and computes, by name; less is better."""
    experiment, model = side.experiment, side.experiment.model
    length = experiment.data.sequence_length
    compute = account(model, length)
    found = [
        ("parameters", float(compute.total_params)),
        ("active parameters", compute.active_params),
        ("FLOPs of a token, forward", compute.forward_flops),
        ("FLOPs of a token, training", compute.training_flops),
        ("bytes of the weights", float(sum(weight_bytes(side.params, model.dtype).values()))),
        ("bytes of the cache, a token", kv_bytes(model, 1, side.cache)),
    ]
    for batch in BATCHES:
        work = total(decode(model, batch, length, side.weights, cache=side.cache))
        found.append((f"bytes of a token decoded with {batch}", work.bytes / batch))
    return found


def times(side: Side) -> list[tuple[str, int, list[float]]]:
    """What a side takes here: name, tokens and seconds of reading a prompt and of decode steps."""
    length = side.experiment.data.sequence_length
    serving = Serving(max(1, length // 2), length, BATCHES, side.cache)
    decoder = Decoder.of(side.experiment.model, side.params, side.controllers)
    return [
        (f"decode {batch}" if batch else "prefill", batch or serving.prompt, measured.seconds)
        for batch, measured in measure_serving(decoder, serving, calls=CALLS, profiled=0)
    ]


def cost(before: tuple[str, float], after: tuple[str, float]) -> dict[str, Any]:
    """One cost of both."""
    (name, old), (_, new) = before, after
    ratio = new / old
    verdict: Verdict = "worse" if ratio > NOTED else "better" if ratio < 1 / NOTED else "same"
    return {"name": name, "before": old, "after": new, "ratio": ratio, "verdict": verdict}


def time_of(
    before: tuple[str, int, Sequence[float]], after: tuple[str, int, Sequence[float]]
) -> dict[str, Any]:
    """One time of both: percentiles, and tokens a second and device."""
    name, found = before[0], {}
    for when, (_, tokens, seconds) in (("before", before), ("after", after)):
        median, p90, p99 = (float(x) for x in np.percentile(seconds, (50, 90, 99)))
        found[when] = median
        found |= {f"p90_{when}": p90, f"p99_{when}": p99, f"tokens_per_second_{when}": tokens / median}

    def longer(one: str, other: str) -> bool:
        return found[one] > max(SLOWER * found[other], found[f"p90_{other}"])

    verdict: Verdict = (
        "worse" if longer("after", "before") else "better" if longer("before", "after") else "same"
    )
    return {"name": name, **found, "ratio": found["after"] / found["before"], "verdict": verdict}


def _together(side: Mapping[str, Answers], names: Sequence[str]) -> Answers:
    parts = [asdict(side[name]) for name in names]
    return Answers(**{kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]})
