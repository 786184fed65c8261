"""Hand a trained run to the engines that serve models, or take a checkpoint of theirs in.

    uv run export.py runs/quickstart --to hf --out exports/quickstart --verify
    uv run export.py --from hf exports/quickstart --out runs/again

The first writes a Hugging Face checkpoint of the architecture that carries the model; the second makes a run
of one, which eval.py measures and from which train.py goes on: --init "Continue(run='runs/again')".
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from moe.checkpoint import Checkpoints, CheckpointStore
from moe.config import override, to_json
from moe.data import Data, Dataset, TokenizerFile, prepare
from moe.errors import UserError, run_main
from moe.experiment import Experiment, Train
from moe.export.architecture import Architecture, choose
from moe.export.architectures import ARCHITECTURES
from moe.export.assemble import assemble
from moe.export.card import evaluation, model_card
from moe.export.finished import finished_folder
from moe.export.hugging_face import Precision, Text, write_checkpoint
from moe.export.importing import HuggingFaceWeights, architecture_of, read_config, read_tokenizer
from moe.export.serving import HUGGING_FACE, told
from moe.export.verify import client_answer, compare, our_answer, python_with
from moe.export.weights import CheckpointWeights, find_checkpoint
from moe.mesh import MeshConfig, make_mesh
from moe.nn import structure
from moe.training.run_directory import CONFIG, read_experiment
from moe.training.state import TrainState

PEERS = Path(__file__).parent / ".peers"
PROMPT_TOKENS, NEW_TOKENS = 64, 16  # of each prompt with which an export is verified

say = Console(highlight=False, soft_wrap=True).print


@dataclass(frozen=True)
class Export:
    """What to write, and how."""

    to: Literal["hf"] = "hf"
    """The format: hf is a Hugging Face checkpoint (safetensors)."""

    out: str = ""
    """Folder to write, which must not exist yet."""

    checkpoint: str = "last"
    """`last`, `best` (lowest validation loss while training) or a step."""

    architecture: str = ""
    """Which architecture to write (qwen3_moe, glm4_moe, ...); by default the first that fits."""

    precision: Precision = "float32"
    """Of the weights. float32 keeps every bit of them."""

    shard_gb: float = 5.0
    """A new safetensors file begins where one would grow beyond this."""

    verify: bool = False
    """Load the export in its client and compare log-probabilities and greedy tokens with the run's."""

    python: str = ""
    """An interpreter that has the client; by default this one, or that of the peers' environments."""

    def __post_init__(self):
        if not self.shard_gb > 0:
            raise UserError(f"--shard-gb {self.shard_gb} must be more than 0")


@dataclass(frozen=True)
class Import:
    """What to make of a checkpoint."""

    out: str = ""
    """Directory of the run to make, which must not exist yet."""

    end_of_text: str = ""
    """The token between documents; by default the end-of-sequence token that the checkpoint names."""

    data: Data = field(default_factory=lambda: Data(sequence_length=256))
    """What eval.py will measure it on; the tokenizer is always the checkpoint's."""


def main() -> None:
    """Read the command line; export or import."""
    arguments = sys.argv[1:]
    if len(arguments) >= 3 and arguments[0] == "--from":
        kind, folder, *rest = arguments[1:]
        if kind != "hf":
            raise UserError(f"--from {kind}: only hf, a Hugging Face checkpoint, can be read")
        options = override(Import(), rest, prog=f"export.py --from hf {folder}", description=__doc__ or "")
        take_in(Path(folder), _given(options.out), options)
        return
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            "give a run directory first, for example: uv run export.py runs/quickstart --to hf --out "
            "exports/quickstart; or: uv run export.py --from hf FOLDER --out runs/NAME"
        )
    options = override(Export(), arguments[1:], prog=f"export.py {arguments[0]}", description=__doc__ or "")
    hand_out(Path(arguments[0]), _given(options.out), options)


def hand_out(directory: Path, out: Path, options: Export) -> None:
    """Write a run's checkpoint as a Hugging Face checkpoint."""
    experiment = read_experiment(directory)
    for what in experiment.model.looks_ahead:
        raise UserError(f"{what} lets tokens see later ones: the model cannot generate, so nothing serves it")
    jax.set_mesh(make_mesh(MeshConfig()))
    architecture = choose(_wanted(options.architecture), experiment.model)
    dataset = prepare(experiment.data)
    weights = CheckpointWeights(find_checkpoint(directory, experiment.checkpoints, options.checkpoint))
    text = Text(dataset.tokenizer, experiment.data.tokenizer.end_of_text, experiment.data.sequence_length)
    with finished_folder(out) as folder:
        write_checkpoint(
            folder,
            architecture,
            experiment.model,
            weights.read,
            text,
            precision=options.precision,
            shard_bytes=int(options.shard_gb * 1e9),
        )
        card = model_card(
            experiment,
            architecture,
            step=weights.step,
            averaged=weights.averaged,
            quality=evaluation(directory, weights.step),
            engines=HUGGING_FACE,
            path=out,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    say(f"written: {out}, step {weights.step} as {architecture.class_name} in {options.precision}")
    for line in told(HUGGING_FACE, out):
        say(line)
    if options.verify:
        verify(experiment, weights, dataset, out, options)


def verify(
    experiment: Experiment, weights: CheckpointWeights, dataset: Dataset, out: Path, options: Export
) -> None:
    """Compare what transformers says with what the run's model says.

    Raises:
        UserError: they differ, or there is no transformers.
    """
    candidates = [Path(options.python)] if options.python else [PEERS / "transformers" / "bin" / "python"]
    python = python_with("transformers", candidates)
    prompts = validation_prompts(dataset, experiment.data.sequence_length)
    ours = our_answer(experiment.model, weights.read, prompts, NEW_TOKENS)
    found = compare(prompts, ours, client_answer("run_transformers", python, out, prompts, NEW_TOKENS))
    if not found.agrees:
        raise UserError(f"{out} in transformers: {found}; see docs/export.md for what may explain it")
    say(f"verified in transformers, float32: {found}")


def validation_prompts(dataset: Dataset, length: int) -> np.ndarray:
    """The beginning of each slice's validation data, as many rows as the devices share."""
    width = min(PROMPT_TOKENS, length)
    rows = [dataset.tokens(name, "validation")[:width] for name in dataset.slices]
    rows *= -(-jax.device_count() // len(rows))
    usable = len(rows) - len(rows) % jax.device_count()
    return np.stack(rows[:usable]).astype(np.int32)


def take_in(folder: Path, out: Path, options: Import) -> None:
    """Make a run of a Hugging Face checkpoint: no step taken, all weights in a checkpoint of ours."""
    config = read_config(folder)
    architecture = architecture_of(config, ARCHITECTURES)
    model = architecture.model(config)
    jax.set_mesh(make_mesh(MeshConfig()))
    weights = HuggingFaceWeights(folder, architecture, config)
    tokenizer = read_tokenizer(folder, model, options.end_of_text)
    data = replace(options.data, tokenizer=tokenizer)
    fingerprint = prepare(data).fingerprint
    weights.check_zeros()
    experiment = Experiment(
        name=out.name,
        data=replace(data, tokenizer=TokenizerFile(str(out / "tokenizer.json"), tokenizer.end_of_text)),
        model=model,
        train=Train(steps=1, batch_size=jax.device_count()),
        checkpoints=Checkpoints(every=1),
    )
    with finished_folder(out) as run:
        (run / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (run / CONFIG).write_text(to_json(experiment), encoding="utf-8")
        position = {"dataset": fingerprint, "batches": {}, "begun_interval": []}
        with CheckpointStore(run / "checkpoints", experiment.checkpoints) as store:
            store.save(0, untrained(experiment, weights), position, wait=True)
    for name in weights.left_out[:1]:
        say(
            f"left out: {len(weights.left_out)} tensors of a layer that predicts further tokens ({name}, ...)"
        )
    say(f"written: {out}, a run of {architecture.class_name} with no step taken")
    say(f"measure   uv run eval.py {out}")
    say(f"go on     uv run train.py CONFIG.py --init \"Continue(run='{out}')\"")


def untrained(experiment: Experiment, weights: HuggingFaceWeights) -> TrainState:
    """The state of a run that begins with these weights."""
    _, params, controllers = assemble(experiment.model, weights.read)
    transformation = experiment.optimizer.build(structure(experiment.model)[1], experiment.train.steps)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, controllers, jax.jit(transformation.init)(params), None, zero, zero)


def _wanted(name: str) -> tuple[Architecture, ...]:
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    if name and name not in known:
        raise UserError(f"--architecture {name}: there are {', '.join(known)}")
    return (known[name],) if name else ARCHITECTURES


def _given(out: str) -> Path:
    if not out:
        raise UserError("say where to write, for example --out exports/quickstart")
    return Path(out)


if __name__ == "__main__":
    run_main(main)
