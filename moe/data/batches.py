"""Batches of windows: for training shuffled, mixed and endless, for validation in order and once.

A window has S+1 tokens: the first S are inputs, the last S targets. Windows overlap by that one token, so
that every token of a slice is a target once an epoch.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from moe.data.corpus import Split
from moe.data.dataset import Dataset
from moe.errors import UserError

# Rows of an endless iterator: more than any run takes, and exact in the floats that grain divides lengths in.
_ENDLESS = 1 << 48


class Windows(grain.sources.RandomAccessDataSource):
    """The whole windows of one slice and split, by index."""

    def __init__(self, dataset: Dataset, slice_name: str, split: Split, sequence_length: int):
        self._tokens = dataset.tokens(slice_name, split)
        self._slice = np.int32(dataset.slices.index(slice_name))
        self._length = sequence_length

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._length)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        start = index * self._length
        return {
            "tokens": self._tokens[start : start + self._length + 1].astype(np.int32),
            "slice": np.asarray(self._slice),
        }


class _RowsOfBatches(grain.transforms.DatasetSelectionMap):
    """Takes the same rows of every global batch."""

    def __init__(self, batch_size: int, rows: Sequence[int]):
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, len(self._rows))
        return 0, batch * self._batch_size + self._rows[row]


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    sequence_length: int,
    weights: Sequence[tuple[str, float]] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Endless training batches.

    Each slice is shuffled anew every epoch. Slices are interleaved evenly in proportion to their weights
    (within 1 %, the precision of `grain.MapDataset.mix`), so every batch has nearly the whole mixture.

    Args:
        dataset: What `prepare` gave.
        batch_size: Rows of the global batch.
        sequence_length: S, tokens.
        weights: See `mixing_weights`.
        seed: Of the shuffles; counts modulo 2**32.
        rows: Which rows of every global batch to make, such as those of this process's devices; None: all.

    Returns:
        An iterator over `{"tokens": int32 [b, S+1], "slice": int32 [b]}`, b the number of rows. Its
        `get_state()` is a small JSON-able dict, the same for all rows; an iterator made with the same
        arguments, or for other rows, continues after `set_state()` with exactly the batches that were still
        to come.

    Raises:
        UserError: If a weight names no slice, or a slice has no whole window.
    """
    mixture = {name: weight for name, weight in mixing_weights(dataset, weights).items() if weight > 0}
    slices = []
    for name in mixture:
        require_window(dataset, name, "train", sequence_length)
        windows = Windows(dataset, name, "train", sequence_length)
        slices.append(grain.MapDataset.source(windows).shuffle(seed=seed % 2**32).repeat())
    mixed = grain.MapDataset.mix(slices, weights=list(mixture.values()))
    taken = range(batch_size) if rows is None else rows
    chosen = grain.MapDataset.select_from_datasets([mixed], _RowsOfBatches(batch_size, taken))
    batches = chosen.batch(len(taken))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def validation_batches(
    dataset: Dataset,
    slice_name: str,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The validation split of one slice, in a fixed order; every token is a target exactly once.

    Args:
        dataset: What `prepare` gave.
        slice_name: The slice.
        batch_size: Rows of the global batch.
        sequence_length: S, tokens.
        max_tokens: At most this many targets (but at least one window), from windows evenly spread over the
            split.
        rows: Which rows of every global batch to yield; None: all. The number of batches is the same.

    Yields:
        `{"tokens": int32 [b, S+1], "weight": float32 [b, S]}`, b the number of rows; weight is 1 for
        targets and 0 for the padding that fills the last window and the last batch.
    """
    tokens = dataset.tokens(slice_name, "validation")
    windows = np.arange(math.ceil((len(tokens) - 1) / sequence_length))
    if max_tokens is not None and (count := max(1, max_tokens // sequence_length)) < len(windows):
        windows = windows[np.linspace(0, len(windows) - 1, count, dtype=int)]
    taken = slice(None) if rows is None else np.asarray(rows)
    for first in range(0, len(windows), batch_size):
        batch = {
            "tokens": np.full((batch_size, sequence_length + 1), dataset.end_of_text, np.int32),
            "weight": np.zeros((batch_size, sequence_length), np.float32),
        }
        for row, window in enumerate(windows[first : first + batch_size]):
            part = tokens[window * sequence_length : (window + 1) * sequence_length + 1]
            batch["tokens"][row, : len(part)] = part
            batch["weight"][row, : len(part) - 1] = 1
        yield {name: array[taken] for name, array in batch.items()}


def mixing_weights(dataset: Dataset, weights: Sequence[tuple[str, float]]) -> Mapping[str, float]:
    """The share of each slice among training rows.

    Args:
        dataset: What `prepare` gave.
        weights: (slice, weight) pairs, in any scale; a slice that is not named gets none. Empty: in
            proportion to each slice's training tokens.

    Returns:
        A weight for every slice; they sum to 1.

    Raises:
        UserError: If a name is no slice, a weight is negative or not finite, or all are 0.
    """
    given = dict(weights) or dataset.train_tokens
    for name, weight in given.items():
        if name not in dataset.slices:
            near = difflib.get_close_matches(name, dataset.slices, n=1, cutoff=0)[0]
            raise UserError(f"data.weights names {name!r}, which is no slice; the nearest is {near!r}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"data.weights: {name}={weight}; a weight is a finite number, 0 or more.")
    total = sum(given.values())
    if total <= 0:
        raise UserError("data.weights are all 0; give at least one slice a weight above 0.")
    return {name: given.get(name, 0) / total for name in dataset.slices}


def require_window(dataset: Dataset, slice_name: str, split: Split, sequence_length: int) -> None:
    """Raises UserError if a slice cannot fill one training window, or has no validation token at all."""
    tokens = dataset.shards[slice_name][split].tokens
    needed = sequence_length + 1 if split == "train" else 2
    if tokens < needed:
        raise UserError(
            f"slice {slice_name!r} has {tokens:,} {split} tokens, and one window takes {needed:,}: "
            "shorten data.sequence-length, give the slice more text, or leave it out."
        )
