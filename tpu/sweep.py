"""Every mesh that a config permits on a topology, compiled one after the other and ranked."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from moe.analysis.hardware import GIB
from moe.errors import UserError
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from tpu.analyse import describe
from tpu.lowered import Serving
from tpu.report import layout, table
from tpu.steps import STEPS

COMMAND = Path(__file__).with_name("compile.py")


def layouts(
    experiment: Experiment,
    devices: list,
    axes: Sequence[str],
    step: str,
    serving: Serving,
) -> list[MeshConfig]:
    """All ways to lay the devices out along these axes that the batch and the model can share.

    The other axes stay as the experiment has them; one that takes what is left becomes 1.

    Raises:
        UserError: the mesh has no such axis.
    """
    known = {field.name: max(1, getattr(experiment.mesh, field.name)) for field in fields(MeshConfig)}
    for axis in axes:
        if axis not in known:
            raise UserError(f"--axes {axis}: the mesh has no such axis; choose from {', '.join(known)}")
    fixed = math.prod(length for name, length in known.items() if name not in axes)
    if len(devices) % fixed:
        raise UserError(f"the axes that --axes leaves as they are take {fixed} of {len(devices)} devices")
    found = []
    for lengths in factorings(len(devices) // fixed, len(axes)):
        mesh = MeshConfig(**known | dict(zip(axes, lengths, strict=True)))
        try:
            make_mesh(mesh, devices)
            STEPS[step].check(replace(experiment, mesh=mesh), serving, len(devices))
        except UserError:
            continue
        found.append(mesh)
    return found


def factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All tuples of so many factors whose product is the number."""
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        for rest in factorings(number // first, parts - 1):
            yield first, *rest


def sweep(
    experiment: Experiment,
    axes: Sequence[str],
    *,
    path: str,
    topology: str,
    step: str,
    serving: Serving,
    overrides: Sequence[str],
) -> list[dict[str, Any]]:
    """Compile for every layout, print them best first, and return what each gave.

    Each has a process of its own: what libtpu dies of costs one layout, and memory is given back.

    Raises:
        UserError: no mesh is permitted, or none fits.
    """
    found = layouts(experiment, describe(topology), axes, step, serving)
    if not found:
        raise UserError(
            f"no mesh of {topology} divides train.batch_size={experiment.train.batch_size} / "
            f"train.accumulation={experiment.train.accumulation} and the model"
        )
    results = []
    for number, mesh in enumerate(found, 1):
        print(f"{number} of {len(found)}  {layout(asdict(mesh))}", file=sys.stderr, flush=True)
        results.append(_one(path, topology, step, mesh, overrides))
    results.sort(key=lambda r: (not r.get("fits"), -r.get("mfu_compiler", 0.0)))
    print("\n".join(ranking(results)))
    if not results[0].get("fits"):
        raise UserError("no mesh fits: raise train.accumulation, or take more chips")
    print("best  " + " ".join(f"--mesh.{name} {length}" for name, length in results[0]["mesh"].items()))
    return results


def ranking(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each layout, best first."""
    rows = [("mesh", "MFU compiler", "MFU roofline", "bound", "GiB", "sent GB", "FLOPs", "")]
    for r in results:
        name = layout(r["mesh"])
        if "error" in r:
            rows.append((name, "-", "-", "-", "-", "-", "-", r["error"]))
            continue
        rows.append(
            (
                name,
                f"{r['mfu_compiler']:.1%}",
                f"{r['mfu_roofline']:.1%}",
                r["bound"],
                f"{sum(r['memory'].values()) / GIB:.1f}",
                f"{sum(c['bytes'] for c in r['collectives']) / 1e9:.2f}",
                f"{r['compiled_over_expected'] - 1:+.1%}",
                "" if r["fits"] else "does not fit",
            )
        )
    return table(rows)


def _one(path: str, topology: str, step: str, mesh: MeshConfig, overrides: Sequence[str]) -> dict[str, Any]:
    axes = asdict(mesh)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "analysis.json"
        words = [f"--mesh.{name}={length}" for name, length in axes.items()]
        command = [
            sys.executable,
            str(COMMAND),
            path,
            "--topology",
            topology,
            "--step",
            step,
            *overrides,
            *words,
        ]
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(out.read_text())
    lines = [line for line in done.stderr.splitlines() if "error: " in line or "Check failed" in line]
    said = lines[-1].rpartition("error: ")[2] if lines else f"the compiler ended with {done.returncode}"
    return {"mesh": axes, "error": said[:160]}
