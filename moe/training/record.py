"""Recording who goes where: a forward pass over batches, in evaluation mode, that keeps every assignment."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe.analysis.routing import Recorder, Recording, by_token, join
from moe.data import Dataset, train_batches
from moe.errors import UserError
from moe.experiment import Experiment
from moe.mesh import spec
from moe.nn import TransformerConfig, structure
from moe.routing import Blending
from moe.training.evaluate import own_rows, slice_rows, to_devices

Batch = dict[str, np.ndarray]


def check_recordable(model: TransformerConfig) -> None:
    """Refuse a model in which no token goes to single experts, or not every token through every layer.

    Raises:
        UserError: one line naming the field.
    """
    if not model.moe_layers:
        raise UserError(f"model.layers={model.layers!r} is a dense model: there is no routing to look at")
    if model.layers != model.layers.upper():
        raise UserError(
            f"model.layers={model.layers!r} has layers that only some tokens enter; routing can be looked at "
            "where every token passes every layer"
        )
    if isinstance(model.moe.routing, Blending):
        raise UserError(
            f"model.moe.routing={model.moe.routing} sends no token to single experts: there are no routes to "
            "look at"
        )


def validation_rows(
    experiment: Experiment, dataset: Dataset, *, batch_size: int, tokens: int | None
) -> Iterator[Batch]:
    """The validation data, slice after slice: `tokens`, `weight` and `slice` of this process's rows.

    Args:
        experiment: for the sequence length.
        dataset: the prepared text.
        batch_size: sequences at once, over all devices.
        tokens: most tokens of a slice, spread over it; None takes all.
    """
    for index, name in enumerate(dataset.slices):
        for batch in slice_rows(dataset, name, experiment.data, batch_size=batch_size, tokens=tokens):
            yield batch | {"slice": np.full(len(batch["tokens"]), index, np.int32)}


def training_rows(
    experiment: Experiment, dataset: Dataset, *, batch_size: int, tokens: int
) -> Iterator[Batch]:
    """The first training data in the run's own order, in whole sequences; see `validation_rows`."""
    length = experiment.data.sequence_length
    rows = own_rows(batch_size)
    batches = train_batches(
        dataset,
        batch_size=batch_size,
        sequence_length=length,
        weights=experiment.data.weights,
        seed=experiment.seed,
        rows=rows,
    )
    wanted = max(1, tokens // length)
    for first in range(0, wanted, batch_size):
        batch = next(batches)
        weight = np.repeat((first + np.asarray(rows) < wanted).astype(np.float32)[:, None], length, axis=1)
        yield {"tokens": batch["tokens"], "slice": batch["slice"], "weight": weight}


def record(
    step: Callable[..., dict[str, jax.Array]],
    params: nnx.State,
    controllers: nnx.State,
    batches: Iterable[Batch],
    *,
    num_experts: int,
    slices: tuple[str, ...],
) -> Recording:
    """Route the batches and keep what happened; rows that only fill a batch are left out.

    Args:
        step: from `make_record_step`.
        params: of the model.
        controllers: state of balance controllers and strategies.
        batches: from `validation_rows` or `training_rows`.
        num_experts: what the strategy chooses from, `MoEConfig.num_choices`.
        slices: names of what the batches' `slice` counts.
    """
    parts = []
    for batch in batches:
        arrays = [to_devices(batch[name]) for name in ("tokens", "weight", "slice")]
        parts.append(_recording(jax.device_get(step(params, controllers, *arrays)), num_experts, slices))
    return join(parts)


def make_record_step(config: TransformerConfig, *, chunks: int = 1) -> Callable[..., dict[str, jax.Array]]:
    """Build the compiled forward pass: (params, controllers, tokens [B, S+1], weight [B, S], slice [B]).

    It returns all that a `Recording` is made of, whole in every process. The model is that of `config` with a
    `Recorder` among its balancers, which changes neither parameters nor routes.

    Args:
        config: of the model.
        chunks: parts of the sequence whose logits are made one after the other.
    """
    recorded = replace(config, moe=replace(config.moe, balance=(*config.moe.balance, Recorder())))
    graph, _ = structure(recorded)

    def step(params, controllers, tokens, weight, slices):
        model = nnx.merge(graph, params, controllers)
        hidden, statistics = model(tokens[:, :-1], weight > 0)
        predicted = [jnp.argmax(model.logits(part), axis=-1) for part in jnp.split(hidden, chunks, axis=1)]
        found = {
            "tokens": tokens,
            "mask": weight > 0,
            "slice": slices,
            "predicted": jnp.concatenate(predicted, axis=1),
            "entropy": statistics.entropy,
            **{name: statistics.observed[f"recorded_{name}"] for name in ("token", "expert", "weight")},
        }
        return jax.tree.map(lambda x: jax.sharding.reshard(x, spec()), found)

    return jax.jit(step)


def _recording(found: dict[str, np.ndarray], num_experts: int, slices: tuple[str, ...]) -> Recording:
    """What a step returned, without the rows that only fill a batch."""
    mask = found["mask"]
    rows, (sequences, length) = mask.any(1), mask.shape
    expert, combine_weight = by_token(
        found["token"],
        found["expert"],
        found["weight"],
        sequences=sequences,
        sequence_length=length,
        num_experts=num_experts,
    )
    return Recording(
        num_experts=num_experts,
        slices=slices,
        slice_id=found["slice"][rows],
        token_id=found["tokens"][rows, :-1],
        target_id=found["tokens"][rows, 1:],
        predicted_id=found["predicted"][rows],
        mask=mask[rows],
        expert=expert[rows],
        combine_weight=combine_weight[rows],
        entropy=found["entropy"].T[rows],
    )
