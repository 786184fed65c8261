"""Quality on the validation data, slice by slice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moe.data import Data, Dataset, validation_batches
from moe.mesh import spec


@dataclass(frozen=True)
class SliceResult:
    """What one slice's validation tokens showed."""

    loss: float
    """Cross-entropy, nats a token."""

    bits_per_byte: float
    """Cross-entropy in bits for each UTF-8 byte of text: comparable across tokenizers."""

    targets: int
    """Tokens that were predicted."""

    text_bytes: int
    """UTF-8 bytes that they stand for."""

    load: np.ndarray
    """[L, E] assignments, relative to balance (1 everywhere); empty for a dense model."""

    dropped_fraction: float
    """Assignments that the dispatch dropped."""

    replayed_fraction: float | None
    """Tokens whose routes `Replay` read from its trace; None under any other strategy."""


@dataclass(frozen=True)
class Evaluation:
    """All slices, and all of them together."""

    slices: dict[str, SliceResult]
    total: SliceResult


def evaluate(
    eval_step,
    params,
    controllers,
    dataset: Dataset,
    data: Data,
    *,
    batch_size: int,
    tokens: int | None = None,
) -> Evaluation:
    """Evaluate every slice.

    Args:
        eval_step: from `make_eval_step`.
        params: of the model.
        controllers: state of balance controllers.
        dataset: the prepared text.
        data: its config, for the sequence length.
        batch_size: sequences at once, over all devices.
        tokens: most tokens of a slice, spread over it; None takes all.
    """
    token_bytes = jnp.asarray(dataset.token_bytes)
    sums = {}
    for name in dataset.slices:
        parts = [
            eval_step(params, controllers, to_devices(b["tokens"]), to_devices(b["weight"]), token_bytes)
            for b in slice_rows(dataset, name, data, batch_size=batch_size, tokens=tokens)
        ]
        sums[name] = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64), axis=0), *parts)
    total = jax.tree.map(lambda *xs: np.sum(xs, axis=0), *sums.values())
    return Evaluation({name: _result(s) for name, s in sums.items()}, _result(total))


def slice_rows(
    dataset: Dataset, name: str, data: Data, *, batch_size: int, tokens: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the validation data of one slice, as `validation_batches` gives them.

    Args:
        dataset: the prepared text.
        name: of the slice.
        data: its config, for the sequence length.
        batch_size: sequences at once, over all devices.
        tokens: most tokens, spread over the slice; None takes all.
    """
    return validation_batches(
        dataset,
        name,
        batch_size=batch_size,
        sequence_length=data.sequence_length,
        max_tokens=tokens,
        rows=own_rows(batch_size),
    )


def own_rows(batch_size: int) -> list[int]:
    """Which rows of a global batch lie on this process's devices, in the mesh that is set: ascending."""
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    held = sharding.addressable_devices_indices_map((batch_size,))
    return sorted({row for index in held.values() if index for row in range(batch_size)[index[0]]})


def to_devices(rows: np.ndarray) -> jax.Array:
    """This process's rows of a batch as part of the global array, split over the mesh that is set."""
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    return jax.make_array_from_process_local_data(sharding, rows)


def _result(sums: dict) -> SliceResult:
    routing = sums["routing"]
    load, dropped, replayed = np.zeros((0, 0)), 0.0, None
    if routing is not None:
        assignments = routing.load.sum(-1, keepdims=True)
        load = routing.load.shape[-1] * routing.load / np.maximum(assignments, 1)
        dropped = float(routing.dropped.sum() / max(assignments.sum(), 1))
        if "replayed" in routing.observed:
            replayed = float(routing.observed["replayed"].sum() / max(routing.tokens.sum(), 1))
    return SliceResult(
        loss=float(sums["nll"] / max(sums["targets"], 1)),
        bits_per_byte=float(sums["nll"] / math.log(2) / max(sums["bytes"], 1)),
        targets=int(sums["targets"]),
        text_bytes=int(sums["bytes"]),
        load=load,
        dropped_fraction=dropped,
        replayed_fraction=replayed,
    )
