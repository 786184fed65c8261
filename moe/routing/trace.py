"""A routing trace: who went where, sequence by sequence, in one compressed file that `Replay` reads.

The file is a NumPy .npz, its sequences in the order in which they came:

    hash             uint64  [N]            of each sequence's token ids (`sequence_hash`), none twice
    expert           uint    [N, L, S, K]   its tokens' experts, padded with E, which goes nowhere
    combine_weight   float32 [N, L, S, K]   and their combine weights
    metadata         JSON    num_experts (E, free ones included), layers (L, MoE layers only),
                             sequence_length (S) and experts_per_token (the mean); then whatever the
                             writer knows of its run; `strategy` holds its fields as config.json does

K is the most experts that any token has. Other programs may write such a file too, say an inference engine
its rollouts.
"""

import errno
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32, UInt64

from moe.errors import UserError
from moe.routing.integer_hash import integer_hash

FIELD = "model.moe.routing.trace"
SEEDS = (1, 2)  # of the two halves of a sequence's hash


def sequence_hash(token_id: Int[Array, "S"]) -> UInt32[Array, "2"]:
    """64 bits that depend on every token id and its position, as two halves: JAX has no 64-bit integers.

    Each half is the sum modulo 2^32 of MurmurHash3(seed; position, id) over the sequence, so it needs no
    loop along it. Sequences that differ in a single token never agree; otherwise the odds are 2^-64 a pair,
    which for N sequences makes about N^2 / 2^65: 3e-8 for a million, 3% for a billion.
    """
    position = jnp.arange(len(token_id))
    halves = [jnp.sum(integer_hash(seed, position, token_id), dtype=jnp.uint32) for seed in SEEDS]
    return jnp.stack(halves)


def sequence_hashes(token_id: Int[np.ndarray, "N S"]) -> UInt64[np.ndarray, "N"]:
    """The hash of each sequence as one number, the first half above the second."""
    halves = np.asarray(jax.jit(jax.vmap(sequence_hash))(token_id), np.uint64)
    return (halves[:, 0] << np.uint64(32)) | halves[:, 1]


@dataclass(frozen=True)
class TraceInfo:
    """What can be said of a trace without reading its arrays."""

    num_experts: int
    """Experts that the strategy chose from, E."""

    layers: int
    """MoE layers, L."""

    sequence_length: int
    """Tokens of a sequence, S."""

    experts_per_token: float
    """How many experts a token has on average."""

    metadata: Mapping[str, Any]
    """All that the writer noted."""


def check_writable(path: Path) -> None:
    """Refuse a place for the trace before the work is done.

    Raises:
        UserError: one line with the reason.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(
            f"--trace {path}: {error.strerror}; give a file in a folder that is there and can be written"
        ) from error


def write_trace(
    path: Path,
    token_id: Int[np.ndarray, "N S"],
    expert: Int[np.ndarray, "N L S K"],
    combine_weight: Float[np.ndarray, "N L S K"],
    num_experts: int,
    metadata: Mapping[str, Any],
    mask: Bool[np.ndarray, "N S"] | None = None,
) -> int:
    """Write a trace, whole or not at all; of equal sequences the first is kept.

    Args:
        path: the file.
        token_id: what each sequence is known by.
        expert: padded with `num_experts`.
        combine_weight: anything where `expert` is padding.
        num_experts: E.
        metadata: what else to note, as JSON holds it.
        mask: False for padding, which goes nowhere and does not count in the mean.

    Returns:
        How many sequences it holds.

    Raises:
        UserError: the file cannot be written.
    """
    hashes = sequence_hashes(token_id)
    kept = np.sort(np.unique(hashes, return_index=True)[1])
    _, layers, length, _ = expert.shape
    tokens = token_id.size if mask is None else mask.sum()
    shape = {
        "num_experts": num_experts,
        "layers": layers,
        "sequence_length": length,
        "experts_per_token": float((expert < num_experts).sum() / (layers * tokens)),
    }
    arrays = {
        "hash": hashes[kept],
        "expert": expert[kept].astype(np.min_scalar_type(num_experts)),
        "combine_weight": combine_weight[kept].astype(np.float32),
        "metadata": np.array(json.dumps(shape | dict(metadata))),
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write the trace {path}: {error.strerror}") from error
    return len(kept)


def trace_info(path: str) -> TraceInfo:
    """What a trace is of, at hardly any cost.

    Raises:
        UserError: there is no such file, or it is no trace.
    """
    metadata = json.loads(str(trace_array(path, "metadata")))
    try:
        return TraceInfo(
            num_experts=metadata["num_experts"],
            layers=metadata["layers"],
            sequence_length=metadata["sequence_length"],
            experts_per_token=metadata["experts_per_token"],
            metadata=metadata,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{FIELD}={path!r}: its metadata lack {error}") from error


def trace_array(path: str, name: str) -> np.ndarray:
    """One array of a trace by its name, read once and kept until the file changes.

    Raises:
        UserError: there is no such file, or it is no trace.
    """
    try:
        found = Path(path).stat()
    except OSError as error:
        raise UserError(
            f"{FIELD}={path!r}: {error.strerror}; `uv run eval.py RUN --trace {path}` writes a trace"
        ) from error
    return _read(path, name, (found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=8)
def _read(path: str, name: str, stamp: tuple[int, int]) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except Exception as error:  # whatever zipfile, zlib and NumPy make of what is in the file
        raise UserError(
            f"{FIELD}={path!r} is no routing trace, or a damaged one; `uv run eval.py RUN --trace FILE` "
            "writes one"
        ) from error
