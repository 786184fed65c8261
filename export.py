"""Hand a trained run to the engines that serve models, or take a checkpoint of theirs in.

    uv run export.py runs/quickstart --to hf --out exports/quickstart --verify
    uv run --extra gguf export.py runs/quickstart --to gguf --quantize q8_0 --out exports/quickstart.gguf
    uv run export.py --from hf exports/quickstart --out runs/again

A run leaves as a checkpoint of the architecture that carries its model. What comes in becomes a run that
eval.py measures and from which train.py goes on: --init "Continue(run='runs/again')".
"""

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from rich.console import Console

from moe.checkpoint import Checkpoints, CheckpointStore
from moe.config import override, to_json
from moe.data import Data, TokenizerFile, prepare
from moe.errors import UserError, run_main
from moe.experiment import Experiment, Train
from moe.export.architecture import Architecture, choose
from moe.export.architectures import ARCHITECTURES
from moe.export.assemble import assemble
from moe.export.card import evaluation, model_card
from moe.export.compressed_tensors import check_format
from moe.export.finished import finished_file, finished_folder
from moe.export.hugging_face import Text, write_checkpoint
from moe.export.importing import HuggingFaceWeights, architecture_of, read_config, read_tokenizer
from moe.export.serving import GGUF, ONNX, STABLEHLO, hugging_face, told
from moe.export.stablehlo import write_stablehlo
from moe.export.stored import Precision, StoredWeights
from moe.export.verified import CLIENTS, validation_prompts, verify
from moe.export.weights import CheckpointWeights, find_checkpoint
from moe.mesh import MeshConfig, make_mesh
from moe.nn import structure
from moe.quant import Format, format_named
from moe.training.run_directory import CONFIG, read_experiment
from moe.training.state import TrainState

QUANTIZED = {"gguf": ("q8_0", "q4_k_m"), "onnx": ("int8", "int4")}  # what takes formats of its own

say = Console(highlight=False, soft_wrap=True).print


@dataclass(frozen=True)
class Export:
    """What to write, and how."""

    to: Literal["hf", "gguf", "onnx", "stablehlo"] = "hf"
    """The format: hf is a Hugging Face checkpoint (a folder of safetensors), gguf a file for llama.cpp, onnx
    a folder for ONNX Runtime, stablehlo a program that any process with JAX runs."""

    out: str = ""
    """Folder or file to write, which must not exist yet."""

    checkpoint: str = "last"
    """`last`, `best` (lowest validation loss while training) or a step."""

    architecture: str = ""
    """Which architecture to write (qwen3_moe, glm4_moe, ...); by default the first that fits."""

    precision: Precision = "float32"
    """Of the weights. float32 keeps every bit of them."""

    quantize: str = ""
    """Matrices in 8 or 4 bits. For hf, laid out by compressed-tensors: int8-dynamic (activations too), int8,
    int4 or fp8, with a group size int4-128; for gguf q8_0 or q4_k_m; for onnx int8 or int4."""

    shard_gb: float = 5.0
    """A new safetensors file begins where one would grow beyond this."""

    verify: bool = False
    """Load the export in each of its clients that is installed, and compare log-probabilities and greedy
    tokens with the run's."""

    python: str = ""
    """An interpreter that has a client; by default this one, or those of the peers' environments."""

    def __post_init__(self):
        if not self.shard_gb > 0:
            raise UserError(f"--shard-gb {self.shard_gb} must be more than 0")
        if self.format:
            check_format(self.format)
        elif self.quantize and self.quantize not in (known := QUANTIZED.get(self.to, ())):
            raise UserError(
                f"--quantize {self.quantize} is not for --to {self.to}"
                + (f", which takes {' and '.join(known)}" if known else "")
            )
        if self.python and not shutil.which(self.python):
            raise UserError(f"--python {self.python} is no program; name an interpreter that has a client")
        if self.to == "gguf" and self.precision == "bfloat16":
            raise UserError("--precision bfloat16 is for --to hf; llama.cpp takes float32 or float16")
        if self.to == "onnx" and self.precision != "float32":
            raise UserError(f"--precision {self.precision} is not for --to onnx: float32, or --quantize int8")

    @property
    def format(self) -> Format | None:
        """Of the matrices of a Hugging Face checkpoint, where they are quantised."""
        return format_named(self.quantize) if self.quantize and self.to == "hf" else None


@dataclass(frozen=True)
class Import:
    """What to make of a checkpoint."""

    out: str = ""
    """Directory of the run to make, which must not exist yet."""

    end_of_text: str = ""
    """The token between documents; by default the end-of-sequence token that the checkpoint names."""

    data: Data = field(default_factory=Data)
    """What eval.py will measure it on, in sequences no longer than the checkpoint's own; the tokenizer is
    always the checkpoint's."""


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


class Job(NamedTuple):
    """A run on its way out."""

    directory: Path
    experiment: Experiment
    weights: CheckpointWeights
    text: Text
    out: Path
    options: Export


def hand_out(directory: Path, out: Path, options: Export) -> None:
    """Write a run's checkpoint in the format asked for, tell how to serve it, and verify it."""
    experiment = read_experiment(directory)
    for what in experiment.model.looks_ahead:
        raise UserError(f"{what} lets tokens see later ones: the model cannot generate, so nothing serves it")
    held = experiment.quantization.weights
    if held and options.quantize:
        raise UserError(f"{directory} holds {held} weights already; leave out --quantize")
    if held and options.to == "hf":
        options = replace(options, quantize=held)
    jax.set_mesh(make_mesh(MeshConfig()))
    dataset = prepare(experiment.data)
    checkpoint = find_checkpoint(directory, experiment.checkpoints, options.checkpoint)
    weights = CheckpointWeights(checkpoint, format_named(held) if held else None)
    text = Text(dataset.tokenizer, experiment.data.tokenizer.end_of_text, experiment.data.sequence_length)
    job = Job(directory, experiment, weights, text, out, options)

    write, engines = {
        "hf": (write_hugging_face, hugging_face(options.format)),
        "gguf": (write_llama_cpp, GGUF),
        "onnx": (write_onnx_runtime, ONNX),
        "stablehlo": (write_program, STABLEHLO),
    }[options.to]
    write(job)
    say(f"written: {out}, step {weights.step}")
    for line in told(engines, out):
        say(line)
    if options.verify:
        prompts = validation_prompts(dataset, experiment.data.sequence_length)
        whole = options.precision == "float32" and not options.quantize
        clients, read = CLIENTS[options.to], weights.read
        if options.to == "hf":  # rounded weights are compared with what our model makes of them
            read = stored(job).read
        verify(out, clients, experiment.model, read, prompts, whole=whole, python=options.python, say=say)


def stored(job: Job) -> StoredWeights:
    """What a Hugging Face checkpoint holds of the run's weights."""
    options, model = job.options, job.experiment.model
    architecture = choose(_wanted(options.architecture), model)
    codes = job.weights.quantized if job.experiment.quantization.weights else None
    return StoredWeights(architecture, model, job.weights.read, options.precision, options.format, codes)


def write_hugging_face(job: Job) -> None:
    """A folder with safetensors, configs, tokenizer and model card."""
    directory, experiment, weights, text, out, options = job
    weights_there = stored(job)
    with finished_folder(out) as folder:
        write_checkpoint(folder, weights_there, text, shard_bytes=int(options.shard_gb * 1e9))
        card = model_card(
            experiment,
            weights_there.architecture,
            step=weights.step,
            averaged=weights.averaged,
            quality=evaluation(directory, weights.step),
            quantized=options.quantize,
            engines=hugging_face(options.format),
            path=out,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_llama_cpp(job: Job) -> None:
    """One GGUF file."""
    try:
        from moe.export.gguf_file import GgufType, write_gguf
    except ModuleNotFoundError as error:
        raise UserError(f"--to gguf needs {error.name}: uv run --extra gguf export.py ...") from error
    _, experiment, weights, text, out, options = job
    architecture = choose(_wanted(options.architecture), experiment.model)
    precision = cast(GgufType, options.quantize or options.precision)
    with finished_file(out) as path:
        write_gguf(
            path,
            architecture,
            experiment.model,
            weights.read,
            text,
            name=experiment.name,
            precision=precision,
        )


def write_onnx_runtime(job: Job) -> None:
    """A folder with graph, weights, tokenizer and what onnxruntime-genai asks for."""
    try:
        from moe.export.onnx_folder import write_onnx
    except ModuleNotFoundError as error:
        raise UserError(f"--to onnx needs {error.name}: uv run --extra onnx export.py ...") from error
    _, experiment, weights, text, out, options = job
    format = format_named(options.quantize) if options.quantize else None
    with finished_folder(out) as folder:
        write_onnx(folder, experiment.model, weights.read, text, name=experiment.name, format=format)


def write_program(job: Job) -> None:
    """A folder with program, weights and tokenizer."""
    with finished_folder(job.out) as folder:
        write_stablehlo(
            folder, job.experiment.model, job.weights.read, job.text, precision=job.options.precision
        )


def take_in(folder: Path, out: Path, options: Import) -> None:
    """Make a run of a Hugging Face checkpoint: no step taken, all weights in a checkpoint of ours."""
    config = read_config(folder)
    architecture = architecture_of(config, ARCHITECTURES)
    model = architecture.model(config)
    jax.set_mesh(make_mesh(MeshConfig()))
    weights = HuggingFaceWeights(folder, architecture, config)
    tokenizer = read_tokenizer(folder, model, options.end_of_text)
    length = min(options.data.sequence_length, config.get("max_position_embeddings") or sys.maxsize)
    data = replace(options.data, tokenizer=tokenizer, sequence_length=length)
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
