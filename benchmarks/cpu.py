"""Speed on this CPU, as ratios against peers measured in the same run.

    uv run benchmarks/cpu.py
    uv run benchmarks/cpu.py --quick

Two questions, at the shape of a config, in bfloat16 and in float32:

- What does a mixture cost? Time of the MoE layer (router, dispatch, experts, combine) over that of a dense
  feed-forward layer of equal active FLOPs on the same tokens, for several tiles and dispatches.
- How fast is training? Tokens a second of whole steps (forward, backward, clipping, AdamW), and peak memory,
  against the same architecture in Hugging Face transformers on torch, in the mode that serves it best.

Each program runs in a process of its own, on the same cores; they take turns, never two at once. A ratio is
taken within a round of turns; reported is the median over rounds with the extremes. The results, with the
hardware and the commit, go to `benchmarks/results/cpu.json`, and as a table to `docs/results/cpu.md`, unless
other programs used the machine meanwhile.
`--quick` is a trial: bfloat16, two rounds, no torch.compile, nothing kept.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.peers.environment import peer_python
from benchmarks.peers.qwen3_moe import gathered_bytes, qwen3_moe
from benchmarks.provenance import Others, provenance
from benchmarks.report import describe_mode, markdown
from benchmarks.worker import ROOT, Worker, WorkerError
from moe.config import load_config
from moe.errors import UserError, run_main
from moe.experiment import Experiment

PRECISIONS = {"bfloat16": ("bfloat16 autocast", "bfloat16 parameters"), "float32": ("float32",)}
EXPERTS = ("eager", "grouped_mm", "batched_mm")
MOST_FOR_OTHERS = 0.1  # part of the machine that other programs may use for results to be kept
MODE_LIMIT = 60.0  # seconds that a mode of the peer may take to its first step, torch.compile included
PEER = "benchmarks/peers/transformers_train.py"
LAYER_REPETITIONS = 3  # rounds of layers for each round of train steps, which take longer


@dataclass(frozen=True)
class Options:
    """What to measure."""

    config: str = "configs/quickstart.py"
    """The config whose shape is measured."""

    rounds: int = 7
    """Rounds of turns over which medians are taken."""

    steps: int = 3
    """Train steps of one turn."""

    threads: int = 2
    """Cores that every program may use."""

    quick: bool = False
    """A trial: bfloat16, two rounds, no torch.compile, nothing kept."""


def main() -> None:
    """Measure, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, rounds=2)
    hold_cores(options.threads)
    experiment, _ = load_config(options.config, Experiment)
    python = peer_python(ROOT / "benchmarks" / "peers" / "transformers.txt")

    others = Others()
    results = provenance() | {"config": options.config, "shape": shape_of(experiment)}
    results |= {"threads": options.threads, "steps_of_a_turn": options.steps, "layers": {}, "train": {}}
    for dtype in ["bfloat16"] if options.quick else PRECISIONS:
        results["layers"][dtype] = measure_layers(options, dtype)
        results["train"][dtype] = measure_training(options, experiment, python, dtype)

    results["others_share"] = others.share()

    table = markdown(results)
    print(table)
    if not options.quick:
        if results["others_share"] > MOST_FOR_OTHERS:
            raise UserError(
                f"not kept: other programs took {results['others_share']:.0%} of the machine, which distorts "
                "the ratios; run the same command when it is quiet"
            )
        keep(ROOT / "benchmarks" / "results" / "cpu.json", json.dumps(results, indent=2) + "\n")
        keep(ROOT / "docs" / "results" / "cpu.md", table)


def hold_cores(count: int) -> None:
    """Bind this process, and so all that it starts, to some of the cores it may use."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise UserError(f"--threads {count}: this process may use {len(cores)} cores only")
    os.sched_setaffinity(0, cores[:count])


def shape_of(experiment: Experiment) -> dict[str, Any]:
    """What the table says of the model and its batch."""
    model = experiment.model
    return {
        "sequences": experiment.train.batch_size,
        "sequence_length": experiment.data.sequence_length,
        "layers": model.layers,
        "width": model.width,
        "num_experts": model.moe.num_experts,
        "expert_width": model.moe.expert_width,
        "experts_per_token": model.moe.routing.experts_per_token(model.moe.num_experts),
        "vocab_size": model.vocab_size,
        "dispatch": repr(model.moe.dispatch),
    }


def measure_layers(options: Options, dtype: str) -> dict[str, Any]:
    """Times of the dense layer and of the MoE layer under each dispatch: seconds of every round."""
    note(f"{dtype}: layers")
    task = {"config": options.config, "dtype": dtype}
    with Worker(Path(sys.executable), "benchmarks/layers.py", task) as worker:
        return worker.ready | worker.ask(options.rounds * LAYER_REPETITIONS)


def measure_training(options: Options, experiment: Experiment, python: Path, dtype: str) -> dict[str, Any]:
    """Our train step and the peer's in its best mode, in turns; and how that mode was found."""
    modes = peer_modes(options, experiment, python, dtype)
    best = mode_of(fastest(modes))
    note(f"{dtype}: train step, against transformers, {describe_mode(best)}")
    ours_task = {"config": options.config, "dtype": dtype}
    with (
        Worker(Path(sys.executable), "benchmarks/train_step_cpu.py", ours_task) as ours,
        Worker(python, PEER, peer_task(options, experiment) | best) as theirs,
    ):
        if (mine := ours.ready["parameters"]) != (other := theirs.ready["parameters"]):
            raise UserError(
                f"{options.config}: {mine} parameters, but {other} in the peer; what they differ in is to be "
                "told in benchmarks/peers/qwen3_moe.py"
            )
        turns = [(ours.ask(options.steps), theirs.ask(options.steps)) for _ in range(options.rounds)]
    return {
        "tokens_of_a_step": experiment.train.batch_size * experiment.data.sequence_length,
        "ours": ours.ready | summary([turn for turn, _ in turns]),
        "peer": best | theirs.ready | summary([turn for _, turn in turns]),
        "peer_modes": modes,
    }


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of every step, turn by turn, and the most memory held."""
    return {"turns": [turn["seconds"] for turn in turns], "peak_bytes": turns[-1]["peak_bytes"]}


def peer_modes(options: Options, experiment: Experiment, python: Path, dtype: str) -> list[dict[str, Any]]:
    """Every mode of the peer with the seconds of the faster of two steps, or why it did not run.

    torch.compile is tried for the fastest experts of each precision.
    """
    tried = []
    for precision in PRECISIONS[dtype]:
        modes = [{"precision": precision, "experts": experts, "compile": False} for experts in EXPERTS]
        eager = [try_mode(options, experiment, python, mode) for mode in modes]
        tried += eager
        if not options.quick:
            tried.append(try_mode(options, experiment, python, mode_of(fastest(eager)) | {"compile": True}))
    return tried


def try_mode(options: Options, experiment: Experiment, python: Path, mode: dict[str, Any]) -> dict[str, Any]:
    """The mode with its seconds a step, or with the reason why it did not run."""
    note(f"transformers: {describe_mode(mode)}")
    needed = gathered_bytes(experiment) if mode["experts"] == "batched_mm" else 0
    if needed > memory_bytes() / 4:
        return mode | {"failed": f"not run: it gathers expert matrices of at least {needed / 2**30:.0f} GiB"}
    try:
        with Worker(python, PEER, peer_task(options, experiment) | mode, MODE_LIMIT) as worker:
            return mode | {"seconds": min(worker.ask(2, MODE_LIMIT)["seconds"])}
    except WorkerError as error:
        return mode | {"failed": str(error)}


def fastest(modes: list[dict[str, Any]]) -> dict[str, Any]:
    """The mode with the shortest step of those that ran."""
    ran = [mode for mode in modes if "seconds" in mode]
    if not ran:
        raise UserError(f"the peer ran in no mode: {modes[0]['failed']}")
    return min(ran, key=lambda mode: mode["seconds"])


def mode_of(tried: dict[str, Any]) -> dict[str, Any]:
    """The mode alone, without what came of it."""
    return {name: tried[name] for name in ("precision", "experts", "compile")}


def peer_task(options: Options, experiment: Experiment) -> dict[str, Any]:
    """What the peer builds and trains on; its mode comes on top."""
    return {
        "model": qwen3_moe(experiment),
        "batch": experiment.train.batch_size,
        "sequence": experiment.data.sequence_length,
        "threads": options.threads,
    }


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def note(message: str) -> None:
    """Tell on stderr what goes on."""
    print(message, file=sys.stderr, flush=True)


def keep(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    run_main(main)
