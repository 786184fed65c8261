"""Compile a run's step for TPUs that are not here, and say whether it fits and how fast it should be.

    uv run --extra tpu tpu/compile.py configs/olmoe_1b_7b.py --topology v6e:16x16
    uv run --extra tpu tpu/compile.py configs/olmoe_1b_7b.py --topology v6e:16x16 --mesh.expert 8
    uv run --extra tpu tpu/compile.py configs/olmoe_1b_7b.py --topology v5p:4x4x8 --sweep --out olmoe_v5p.json

Needs no TPU: libtpu compiles for a topology that it only describes, and nothing is allocated. Prints memory
by kind, FLOPs against those that the model should cost, HBM bytes, every collective with its mesh axes, and
a predicted step time and MFU; `docs/tpu.md` says what the prediction leaves out.

    --topology NAME   v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x8: generation and sides in chips
    --step NAME       which program: train, or prefill and decode of `generate.py`
    --slots, --length, --prompt, --cache   what those are laid out for (see `tpu/lowered.py`)
    --sweep           compile for every mesh that the config permits, rank them, name the best
    --axes NAME ...   the mesh axes that a sweep tries; the others stay as they are
    --out FILE        write everything as JSON
    --hlo FILE        write the compiled program

Fields of the config may follow, as with `train.py`.
"""

import os

# Before JAX is imported. Nothing here runs on a TPU, so several of these may share a machine with one.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",  # of this host; spares a warning, and no topology asks for it
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from moe.config import load_config, override
from moe.errors import UserError, run_main
from moe.experiment import Experiment
from tpu.analyse import analyse
from tpu.chips import CHIPS, chip_of
from tpu.lowered import Serving
from tpu.report import page
from tpu.steps import STEPS
from tpu.sweep import sweep


@dataclass(frozen=True)
class Options(Serving):
    """What to compile, and for what."""

    topology: str = ""
    """Generation and sides in chips, like v6e:16x16."""

    step: str = "train"
    """Which program of a run."""

    sweep: bool = False
    """Every mesh that the config permits."""

    axes: tuple[str, ...] = ("fsdp", "expert")
    """Mesh axes that a sweep tries; the others stay as they are."""

    out: str = ""
    """File for the results, as JSON."""

    hlo: str = ""
    """File for the compiled program, as HLO."""

    def check(self) -> None:
        """Refuse what is missing or unknown.

        Raises:
            UserError: one line naming the option.
        """
        if not self.topology:
            raise UserError(f"say for which TPU: --topology v6e:16x16 (or {', '.join(CHIPS)})")
        chip_of(self.topology)
        if self.step not in STEPS:
            raise UserError(f"--step {self.step!r}: choose from {', '.join(STEPS)}")
        for name, file in {"out": self.out, "hlo": self.hlo}.items():
            if file and not Path(file).absolute().parent.is_dir():
                raise UserError(f"--{name} {file}: no such folder")


def main() -> None:
    """Read the command line, compile, tell."""
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    path, *arguments = sys.argv[1:]
    if path.startswith("-"):
        raise UserError(
            "give a config first, for example: tpu/compile.py configs/olmoe_1b_7b.py --topology v6e:16x16"
        )
    mine, others = separated(arguments)
    options = override(Options(), mine, prog="tpu/compile.py", description=__doc__ or "")
    options.check()
    experiment, description = load_config(path, Experiment)
    experiment = override(experiment, others, prog=f"tpu/compile.py {path}", description=description)
    words = ["uv", "run", "--extra", "tpu", "tpu/compile.py", path, "--topology", options.topology, *others]
    command = shlex.join(
        [*words, *(["--step", options.step] if options.step != "train" else []), *serving(options)]
    )
    if options.sweep:
        layouts = sweep(
            experiment,
            options.axes,
            path=path,
            topology=options.topology,
            step=options.step,
            serving=options,
            overrides=[*others, *serving(options)],
        )
        results = {"command": f"{command} --sweep --axes {' '.join(options.axes)}", "layouts": layouts}
    else:
        analysis, program = analyse(experiment, options.topology, options.step, options)
        print(page(analysis))
        results = {"command": command, **analysis.json()}
        if options.hlo:
            Path(options.hlo).write_text(program)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


def serving(options: Options) -> Iterator[str]:
    """The words that say what generation is laid out for."""
    for field in fields(Serving):
        value = getattr(options, field.name)
        if value != field.default:
            yield from (f"--{field.name}", str(value))


def separated(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words of this command's own options, and those that set fields of the config."""
    mine, others = [], []
    here = others
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            here = mine if name in Options.__dataclass_fields__ else others
        here.append(word)
    return mine, others


if __name__ == "__main__":
    run_main(main)
