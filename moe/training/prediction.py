"""`eval.py ... --compute`: what a config or a run costs, with no checkpoint and no device."""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from moe.analysis.cost.plot import draw
from moe.analysis.cost.report import CostReport, Setup, as_dict, predict
from moe.analysis.cost.table import show
from moe.analysis.hardware import HARDWARE, hardware_named
from moe.config import load_config, override
from moe.errors import UserError
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from moe.quant import format_named
from moe.training.run_directory import read_experiment


@dataclass(frozen=True)
class Prediction(Experiment):
    """An experiment, and what is asked about it."""

    compute: bool = True
    """Predict parameters, FLOPs, bytes, memory, time and cost; nothing is trained or loaded."""

    hardware: str = "h100,h200,a100,v5e,v5p,v6e,tpu7x,cpu"
    """Chips to time it on, by their names in moe/analysis/hardware.py."""

    price: str = ""
    """Dollars for an hour of one chip, for the cost of a million tokens: h100=2.5,v5e=1.2."""

    context: int = 0
    """Tokens of a prompt, and those that a decoded token attends to; 0 takes data.sequence_length."""

    batches: tuple[int, ...] = (1, 8, 32, 128, 512)
    """Sequences that are decoded together."""

    chips: int = 0
    """That share the work; 0 takes the fewest, a power of two, whose memory holds it."""

    weights: str = "bf16"
    """Format in which served matrices lie in memory: bf16, or as with generate.py --quantize int8, int4,
    int4-128 and so on; products are in bfloat16 all the same."""

    cache: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """How keys and values are stored, as with generate.py --cache."""

    def __post_init__(self):
        super().__post_init__()
        if not self.batches or min(self.batches) < 1:
            raise UserError(f"batches={self.batches} must be one or more numbers of at least 1")
        if self.weights != "bf16":
            format_named(self.weights)
        for name in ("context", "chips"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")


def predict_cost(path: str, arguments: list[str]) -> None:
    """Print what a config or a run costs, and keep it in runs/NAME/report: compute.json and compute.png.

    Args:
        path: a config file, or a run directory, whose load is then used where it was measured.
        arguments: fields of `Prediction`, as on the command line.

    Raises:
        UserError: one line naming the field or file.
    """
    asked, directory = asked_of(path, arguments, Prediction)
    chips, dollars = hardware_named(asked.hardware), prices(asked.price)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):  # nothing is allocated on it
        load = None if path.endswith(".py") else measured_load(directory, asked)
        found = predict(setup(asked, load), chips, dollars, asked.chips)
        show(found)
        print("written:", *write(found, directory / "report", arguments), sep="\n  ")


def asked_of[Asked: Experiment](path: str, arguments: list[str], kind: type[Asked]) -> tuple[Asked, Path]:
    """What is asked about a config or a run, and the run's directory, which need not be there for a config.

    Args:
        path: a config file, or a run directory.
        arguments: fields of `kind`, as on the command line.
        kind: an experiment with what is asked about it.

    Raises:
        UserError: one line naming the field or file.
    """
    config = path.endswith(".py")
    experiment, description = load_config(path, Experiment) if config else (read_experiment(Path(path)), "")
    given = {field.name: getattr(experiment, field.name) for field in fields(experiment)}
    asked = override(kind(**given), arguments, prog=f"eval.py {path}", description=description)
    return asked, Path("runs") / asked.name if config else Path(path)


def setup(asked: Prediction, load: Float[np.ndarray, "L E"] | None) -> Setup:
    """What is accounted for."""
    return Setup(
        name=asked.name,
        model=asked.model,
        optimizer=asked.optimizer,
        sequence_length=asked.data.sequence_length,
        batch_size=asked.train.batch_size,
        accumulation=asked.train.accumulation,
        loss_chunks=asked.train.loss_chunks,
        average=asked.train.average_decay > 0,
        context=asked.context or asked.data.sequence_length,
        batches=asked.batches,
        weights=asked.weights,
        cache=asked.cache,
        load=load,
    )


def measured_load(directory: Path, asked: Experiment) -> Float[np.ndarray, "L E"] | None:
    """The load that `eval.py RUN` found, if it did and the model still has those experts."""
    path, model = directory / "report" / "eval.json", asked.model
    if not path.is_file() or not model.moe_layers:
        return None
    try:
        load = np.array(json.loads(path.read_text())["total"]["load"], float)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); make it again: uv run eval.py {directory}"
        ) from error
    if load.shape != (model.moe_layers, model.moe.num_choices):
        print(f"note: {path} is of another model; experts are taken to be even", file=sys.stderr)
        return None
    return load


def write(report: CostReport, folder: Path, arguments: list[str]) -> list[Path]:
    """The report's JSON and picture, each whole or not at all."""
    numbers, picture = folder / "compute.json", folder / "compute.png"
    told = {"arguments": arguments} | as_dict(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers.with_name("new_compute.json").write_text(json.dumps(told, indent=1) + "\n")
        draw(report, picture.with_name("new_compute.png"))
        for path in (numbers, picture):
            path.with_name(f"new_{path.name}").replace(path)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    return [numbers, picture]


def prices(text: str) -> dict[str, float]:
    """Dollars by chip.

    Raises:
        UserError: not a list like `h100=2.5,v5e=1.2`.
    """
    found = {}
    for pair in filter(None, text.split(",")):
        name, _, dollars = pair.partition("=")
        try:
            found[name] = float(dollars)
        except ValueError:
            raise UserError(f"--price {text}: {pair!r} is no price; write it like h100=2.5") from None
        if name not in HARDWARE or not 0 < found[name] < float("inf"):
            raise UserError(
                f"--price {text}: {pair!r} must be one of {', '.join(HARDWARE)} and dollars above 0"
            )
    return found
