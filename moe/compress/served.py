"""Measure an export through the engine that serves it: loss of each slice, beside what the run says itself.

    python -m moe.compress.served runs/quickstart exports/quickstart
    python -m moe.compress.served runs/quickstart exports/quickstart-int8 --quantize int8 --tokens 20000
    python -m moe.compress.served runs/quickstart exports/quickstart.gguf

The same windows of validation data go through the run's model, as in `eval.py RUN --quantize FORMAT`, and,
in a process of its own, through transformers (a folder) or llama.cpp (a .gguf file). Prints a table and
writes report/served-NAME.json into the run directory.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from moe.compress.compare import Answers, compare, make_comparison_step, together
from moe.compress.quantized import quantized_weights
from moe.config import override
from moe.data import prepare
from moe.errors import UserError, run_main
from moe.export.verified import LLAMA_CPP, TRANSFORMERS, Client
from moe.export.verify import client_losses
from moe.mesh import MeshConfig, make_mesh
from moe.nn import structure
from moe.training.evaluate import slice_rows
from moe.training.restore import restore
from moe.training.run_directory import read_experiment


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    quantize: str = ""
    """Format of the export's matrices, for the run to take too; as in eval.py. Empty: none."""

    checkpoint: str = "last"
    """`last`, `best` or a step; the one that was exported."""

    tokens: int = 0
    """Validation tokens of each slice, spread over it; 0 takes all."""

    python: str = ""
    """An interpreter that has the client; by default this one, or that of the peers' environments."""


@dataclass(frozen=True)
class Found:
    """Losses of one slice, nats a token."""

    run: float
    """Of the run as it was trained."""

    quantized: float
    """Of the run with quantised matrices; the same where there are none."""

    served: float
    """Of the export in its client."""

    difference: float
    """The last less the one before."""

    error: float
    """Standard error of the difference, over sequences."""

    tokens: int
    """Tokens predicted."""


def main() -> None:
    """Read the command line, measure, tell."""
    if len(sys.argv) < 3 or sys.argv[2].startswith("-"):
        raise UserError(
            "give a run and an export of it: python -m moe.compress.served runs/quickstart exports/quickstart"
        )
    directory, export = Path(sys.argv[1]), Path(sys.argv[2])
    options = override(
        Options(), sys.argv[3:], prog=f"served {directory} {export}", description=__doc__ or ""
    )
    client, python = client_of(export, options.python)
    found = measure(directory, export, options, client, python)
    show(found, options.quantize, client.package)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    path = folder / f"served-{export.name}.json"
    report = {"export": str(export), "client": client.package, "quantized": options.quantize}
    slices = {name: asdict(each) for name, each in found.items()}
    path.write_text(json.dumps(report | {"slices": slices}, indent=1))
    print(f"\nwritten: {path}")


def client_of(export: Path, given: str) -> tuple[Client, Path]:
    """The client that loads an export, and its interpreter.

    Raises:
        UserError: there is no such export, no such client, or it is not installed.
    """
    if (export / "config.json").is_file():
        client = TRANSFORMERS
    elif export.suffix == ".gguf" and export.is_file():
        client = LLAMA_CPP
    else:
        raise UserError(f"{export} is neither the folder of a Hugging Face checkpoint nor a .gguf file")
    python = client.python(given)
    if python is None:
        raise UserError(f"{client.package} is not installed: {client.installing}")
    return client, python


def measure(
    directory: Path, export: Path, options: Options, client: Client, python: Path
) -> dict[str, Found]:
    """What every slice shows, and all together.

    Raises:
        UserError: the run has no such checkpoint, the format does not fit it, or the client fails.
    """
    experiment = read_experiment(directory)
    if experiment.quantization.weights:
        raise UserError(f"{directory} holds quantised weights; give the run that they were made from")
    jax.set_mesh(make_mesh(MeshConfig()))
    state, dataset = restore(directory, experiment, options.checkpoint).state, prepare(experiment.data)
    params = rounded = state.evaluated
    if options.quantize:
        _, _, rounded = quantized_weights(experiment, params, options.quantize)
    devices = jax.device_count()
    rows = -(-experiment.train.batch_size // experiment.train.accumulation // devices) * devices
    step = make_comparison_step(structure(experiment.model)[0], chunks=experiment.train.loss_chunks)
    token_bytes = jnp.asarray(dataset.token_bytes)

    ours, texts, weights = {}, [], []
    for name in dataset.slices:
        tokens = options.tokens or None
        batches = list(slice_rows(dataset, name, experiment.data, batch_size=rows, tokens=tokens))
        ours[name] = compare(step, params, rounded, state.controllers, batches, token_bytes)
        weight = np.concatenate([batch["weight"] for batch in batches])
        real = weight.any(axis=1)
        texts.append(np.concatenate([batch["tokens"] for batch in batches])[real])
        weights.append(weight[real])
    losses = client_losses(client.script, python, export, np.concatenate(texts)) * np.concatenate(weights)
    theirs = np.split(losses.sum(axis=1, dtype=np.float64), np.cumsum([len(part) for part in texts])[:-1])
    found = {name: _found(answers, its) for (name, answers), its in zip(ours.items(), theirs, strict=True)}
    return found | {"all": _found(together(ours.values()), np.concatenate(theirs))}


def _found(ours: Answers, theirs: np.ndarray) -> Found:
    """Of one slice: sums over the tokens of each sequence, ours and theirs."""
    tokens = ours.targets.sum()
    rate = (theirs.sum() - ours.after.sum()) / tokens
    # Of a ratio of two sums, by what each sequence departs from it.
    spread = theirs - ours.after - rate * ours.targets
    return Found(
        run=float(ours.before.sum() / tokens),
        quantized=float(ours.after.sum() / tokens),
        served=float(theirs.sum() / tokens),
        difference=float(rate),
        error=float(np.sqrt((spread**2).sum()) / tokens),
        tokens=int(tokens),
    )


def show(found: dict[str, Found], quantize: str, client: str) -> None:
    """The table on the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("slice", no_wrap=True)
    for column in filter(None, ("run", quantize, client, "difference", "±", "tokens")):
        table.add_column(column, justify="right")
    for name, each in found.items():
        rounded = [f"{each.quantized:.4f}"] if quantize else []
        difference = (f"{each.difference:+.5f}", f"{each.error:.5f}")
        served = (f"{each.served:.4f}", *difference, f"{each.tokens:,}")
        table.add_row(name, f"{each.run:.4f}", *rounded, *served)
    Console(highlight=False).print("loss, nats a token; ± one standard error over sequences", table, sep="\n")


if __name__ == "__main__":
    run_main(main)
