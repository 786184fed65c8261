"""Find the best tiles of the Hopper kernels on the GPU of this machine.

    python -m moe.kernels.tune
    python -m moe.kernels.tune --shapes 32768,2048,1024,64,8 --seconds 60

For each shape T,D,F,E,K (tokens, width, hidden width of an expert, experts, experts of a token) it times
every kernel as `routed_mlp` calls it: first the forms of a tile, then, for the best form, the orders in which
tiles are taken. Candidates take turns; the time of each is its median over rounds. One whose result differs
from that of the rule's tiles is rejected. The best go to `moe/kernels/hopper/tables/`, beside those of other
shapes, where `tiles_for` finds them; what is not measured again stays.
"""

import concurrent.futures
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from moe.errors import UserError, one_line, run_main
from moe.kernels.hopper import Tiles, tiling
from moe.kernels.hopper.pipeline import ROWS
from moe.kernels.hopper.tiling import Case, Measured
from moe.kernels.hopper.works import LayerShape, Work, draw, works

SHAPES = (
    "32768,2048,1024,64,8",  # OLMoE 2409.02060
    "32768,2048,768,128,8",  # Qwen3-30B-A3B 2505.09388
    "8192,4096,14336,8,2",  # Mixtral 8x7B 2401.04088
    "24576,1536,256,128,8",  # a fine-grained 7B 2512.14080
    "32768,2048,512,512,10",  # Qwen3-Next-80B-A3B
)
ROUNDS, SECONDS_OF_A_TURN = 5, 0.01
TOLERANCE = 0.02  # of a number and its row's root mean square: two roundings apart


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shapes: tuple[str, ...] = SHAPES
    """T,D,F,E,K of each layer."""

    tile: int = 128
    """Rows in which groups are padded, as of `Dropless`."""

    seconds: float = 600.0
    """After which no further kernel is begun; what was measured is kept."""

    out: Path | None = None
    """The table to write; the chip's own by default."""


class Candidates:
    """Ways to cut one kernel's work, compiled in threads; the first of all is the rule's."""

    def __init__(self, work: Work, inputs: dict[str, Any], pool: Executor):
        self.work, self._inputs, self._pool = work, inputs, pool
        self._programs: dict[Tiles, Future] = {}
        self._rejected: dict[Tiles, str] = {}
        self._agree: Future | None = None

    def add(self, candidates: list[Tiles]) -> None:
        """Begin to compile those that are new."""
        for tiles in dict.fromkeys(candidates):
            if tiles in self._programs or tiles in self._rejected:
                continue
            try:
                lowered = jax.jit(lambda inputs, tiles=tiles: self.work.run(inputs, tiles)).lower(
                    self._inputs
                )
            except Exception as error:  # whatever the compiler says of one way, others may still do
                self._rejected[tiles] = one_line(error)
                continue
            self._programs[tiles] = self._pool.submit(lowered.compile)
            if self._agree is None:
                agreement = jax.jit(agree).lower(lowered.out_info, lowered.out_info, self._inputs)
                self._agree = self._pool.submit(agreement.compile)

    def wait(self) -> None:
        """Until all are compiled."""
        concurrent.futures.wait(self._programs.values())

    def times(self) -> dict[Tiles, float]:
        """Median seconds of each that gives what the rule's gives, by rounds in which they take turns."""
        programs, calls = self._right_ones(), {}
        for tiles, program in programs.items():
            calls[tiles] = max(1, round(SECONDS_OF_A_TURN / _seconds(program, self._inputs, 1)))
        rounds = [
            {t: _seconds(p, self._inputs, calls[t]) for t, p in programs.items()} for _ in range(ROUNDS)
        ]
        return {tiles: statistics.median(r[tiles] for r in rounds) for tiles in programs}

    def _right_ones(self) -> dict[Tiles, Any]:
        """Compiled programs whose results were compared; none where the rule's does not run."""
        right, expected = {}, None
        for tiles, future in self._programs.items():
            if tiles in self._rejected:
                continue
            try:
                program = future.result()
                result = program(self._inputs)
                expected = result if expected is None else expected
                if self._agree and self._agree.result()(result, expected, self._inputs):
                    right[tiles] = program
                else:
                    self._rejected[tiles] = "its result differs from that of the rule's tiles"
            except Exception as error:
                self._rejected[tiles] = one_line(error)
        return right if self.work.case.rule() in right else {}

    def complain(self) -> None:
        """Say what was rejected, and why."""
        for tiles, why in self._rejected.items():
            print(f"  {self.work.case.kernel}: rejected {in_words(tiles)}: {why[:200]}", flush=True)


def agree(a, b, inputs) -> jax.Array:
    """Whether two results are equal but for rounding, what lies behind the last group left out."""
    rows, used = inputs["weight"].shape[0], inputs["groups"].padded_sizes().sum()

    def close(a, b):
        if a.shape[0] == rows:
            meant = (jnp.arange(rows) < used).reshape(-1, *[1] * (a.ndim - 1))
            a, b = jnp.where(meant, a, 0), jnp.where(meant, b, 0)
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        size = jnp.abs(b) + jnp.sqrt(jnp.mean(b**2, axis=-1, keepdims=True))
        return jnp.all(jnp.abs(a - b) <= TOLERANCE * size)

    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(close, a, b))))


def tune_layer(shape: LayerShape, tile: int, pool: Executor, deadline: float) -> list[Measured]:
    """The best tiles of its kernels, but of those whose turn did not come before the deadline."""
    inputs, found = draw(shape, tile), []
    everything = [Candidates(work, inputs, pool) for work in works(shape, tile)]

    def measured() -> Iterator[tuple[Candidates, Tiles, dict[Tiles, float]]]:
        for candidates in everything:
            candidates.wait()
        for candidates in everything:
            if time.monotonic() < deadline and (times := candidates.times()):
                yield candidates, min(times, key=times.__getitem__), times

    for candidates in everything:
        candidates.add(candidates.work.forms())
    for candidates, best, _ in list(measured()):
        candidates.add(candidates.work.orders(best))
    for candidates, best, times in measured():
        case = candidates.work.case
        found.append(Measured(case, best, 1e3 * times[best], 1e3 * times[case.rule()]))
        speed, by_rule = (candidates.work.flops / ms / 1e9 for ms in (found[-1].ms, found[-1].rule_ms))
        print(
            f"  {case.kernel:33} {case.depth:6} to {case.width:6}  {speed:4.0f} TF/s with {in_words(best)}; "
            f"by the rule {by_rule:.0f}",
            flush=True,
        )
    for candidates in everything:
        candidates.complain()
    return found


def in_words(tiles: Tiles) -> str:
    """128 x 256, 4 stages, strips of 8 along rows."""
    strips = f"strips of {tiles.strip} along {tiles.along}"
    return f"{tiles.rows} x {tiles.columns}, {tiles.stages} stages, {strips}"


def _seconds(program, inputs, calls: int) -> float:
    """Of one call among so many, enqueued back to back."""
    start, result = time.perf_counter(), None
    for _ in range(calls):
        result = program(inputs)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def main() -> None:
    """Read the command line, measure, and write the table shape by shape."""
    options = tyro.cli(Options, description=__doc__)
    deadline, device = time.monotonic() + options.seconds, jax.devices()[0]
    shapes, chip = [LayerShape.parse(text) for text in options.shapes], tiling.present_chip()
    if options.tile < 1 or options.tile % ROWS:
        raise UserError(f"tile={options.tile} must be a multiple of {ROWS}")
    if chip is None:
        raise UserError(f"tiles are tuned on a Hopper GPU, and this is {device.device_kind}; run it there")
    out = options.out or tiling.table_file(chip)
    table = known(out)
    provenance = {"card": device.device_kind, "jax": jax.__version__, "by": "python -m moe.kernels.tune"}
    with ThreadPoolExecutor() as pool:
        for number, shape in enumerate(shapes):
            if time.monotonic() > deadline:
                print(f"time is up: {len(shapes) - number} of {len(shapes)} shapes are not measured")
                break
            print(f"T,D,F,E,K = {options.shapes[number]}", flush=True)
            try:
                found = tune_layer(shape, options.tile, pool, deadline)
            except jax.errors.JaxRuntimeError as error:
                print(f"  left out: {one_line(error)[:200]}", flush=True)
                continue
            table |= {measured.case: measured for measured in found}
            out.write_text(tiling.to_json(list(table.values()), provenance))
    print(f"{len(table)} cases in {out}")


def known(out: Path) -> dict[Case, Measured]:
    """What an earlier search found.

    Raises:
        UserError: the file is no table, or cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writable = not out.is_dir() and os.access(out if out.exists() else out.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"out: {out} cannot be written; choose another file with --out")
    try:
        table = tiling.from_json(out.read_text()) if out.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"out: {out} is no table of tiles ({one_line(error)}); remove it") from error
    return {measured.case: measured for measured in table}


if __name__ == "__main__":
    run_main(main)
