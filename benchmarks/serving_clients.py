"""Whether every client says of trained models what we say: each architecture, in float32, on real text.

    uv run --extra onnx --extra gguf python -m benchmarks.serving_clients
    uv run --extra onnx --extra gguf python -m benchmarks.serving_clients --only olmoe

The quickstart becomes each architecture that `export.py` writes (`benchmarks/serving/architectures.py`) and
is trained on its text with its tokenizer, shortly. Every format in float32 is then loaded by its clients, as
by `export.py --verify`, and asked for validation text: log-probabilities and a greedy continuation.

Clients live in environments of their own, which `benchmarks/peers/environment.py` makes; one that is missing,
or that cannot run a model, is named with its reason. Started again, the command goes on where it stopped:
trained runs stay in `runs/clients`. Results go to `benchmarks/results/serving_clients.json` and
`docs/results/serving_clients.md`; those of `--only` nowhere.
"""

import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jaxtyping import Int

from benchmarks.cpu import keep, note
from benchmarks.provenance import provenance
from benchmarks.serving.architectures import MODELS, experiment
from benchmarks.serving.clients_report import markdown
from benchmarks.worker import ROOT
from export import Export, hand_out
from moe.data import Dataset, prepare
from moe.errors import UserError, one_line, run_main
from moe.experiment import Experiment
from moe.export.verified import CLIENTS, Client
from moe.export.verify import Answer, client_answer, compare, our_answer
from moe.export.weights import CheckpointWeights, find_checkpoint
from moe.mesh import MeshConfig, make_mesh
from train import train

RUNS = Path("runs")
PROMPT, NEW = 96, 32  # tokens of each text; together the context that the models are trained with
TEXTS = 2  # of each slice


@dataclass(frozen=True)
class Options:
    """What to ask."""

    steps: int = 150
    """Training steps of each model: about a minute on two cores."""

    only: str = ""
    """A trial of one architecture, by its name."""


def main() -> None:
    """Train, export, ask, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    if options.only and options.only not in MODELS:
        raise UserError(f"--only {options.only}: there are {', '.join(MODELS)}")
    results = provenance() | {"steps": options.steps, "prompt": PROMPT, "new": NEW}
    results["versions"] = versions()
    results["architectures"] = {
        name: answers(experiment(name, options.steps))
        for name in ([options.only] if options.only else MODELS)
    }
    page = markdown(results)
    print(page)
    if not options.only:
        keep(ROOT / "benchmarks" / "results" / "serving_clients.json", json.dumps(results, indent=2) + "\n")
        keep(ROOT / "docs" / "results" / "serving_clients.md", page)


def answers(wanted: Experiment) -> dict[str, Any]:
    """How each client answers beside us, by format, and the loss of the model on what they are asked."""
    directory = RUNS / wanted.name
    note(f"{wanted.name}: trains")
    if not train(wanted, directory):
        raise UserError(f"{directory} is not trained to its end; the same command goes on")
    jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    texts = validation_texts(prepare(wanted.data))
    weights = CheckpointWeights(find_checkpoint(directory, wanted.checkpoints, "last"))
    ours = our_answer(wanted.model, weights.read, texts, NEW)
    said = np.take_along_axis(ours.log_probabilities[:, :-1], texts[:, 1:, None], axis=-1)
    found = {format: asked(directory, format, texts, ours) for format in CLIENTS}
    return {"loss": -float(said.mean()), "texts": len(texts), "formats": found}


def asked(directory: Path, format: Any, texts: Int[np.ndarray, "B S"], ours: Answer) -> dict[str, Any]:
    """The answer of each client of a format beside ours, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        try:
            hand_out(directory, out, Export(to=format, architecture=directory.name))
        except UserError as error:
            return {client.package: {"refused": one_line(error)} for client in CLIENTS[format]}
        return {client.package: beside(ours, client, out, texts) for client in CLIENTS[format]}


def beside(ours: Answer, client: Client, export: Path, texts: Int[np.ndarray, "B S"]) -> dict[str, Any]:
    """A client's answer beside ours, or why there is none."""
    python = client.python()
    if python is None:
        return {"refused": f"not installed: {client.installing}"}
    note(f"asks {client.package}")
    try:
        theirs = client_answer(client.script, python, export, texts, NEW)
    except UserError as error:
        return {"refused": one_line(error).replace(f"{export} cannot be run by {client.script}: ", "")}
    same = np.cumprod(ours.greedy == theirs.greedy, axis=1)
    return asdict(compare(texts, ours, theirs)) | {"same_tokens": int(same.sum()), "tokens": same.size}


def validation_texts(dataset: Dataset) -> Int[np.ndarray, "B S"]:
    """From each slice's validation data, the first texts."""
    rows = [dataset.tokens(name, "validation")[: TEXTS * PROMPT] for name in dataset.slices]
    return np.concatenate([row.reshape(TEXTS, PROMPT) for row in rows]).astype(np.int32)


def versions() -> dict[str, str]:
    """Of every client that is installed, and of what it computes with."""
    found = {}
    for client in (client for clients in CLIENTS.values() for client in clients):
        if python := client.python():
            ended = subprocess.run(
                [python, "-c", VERSIONS, client.package, "torch"],
                capture_output=True,
                text=True,
                check=True,
            )
            found |= json.loads(ended.stdout)
    return found


VERSIONS = """
import json, sys
from importlib.metadata import packages_distributions, version
names = packages_distributions()
print(json.dumps({names[name][0]: version(names[name][0]) for name in sys.argv[1:] if name in names}))
"""

if __name__ == "__main__":
    run_main(main)
