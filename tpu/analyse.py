"""Compile a step for a topology that is not here, and say what it would cost there."""

import dataclasses
import importlib.util
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from moe.errors import UserError, one_line
from moe.experiment import Experiment
from moe.mesh import make_mesh
from moe.nn import TransformerConfig
from tpu.chips import Place, chip_of
from tpu.collectives import Mesh, gathered
from tpu.estimate import Times, times
from tpu.hlo import Module
from tpu.lowered import Lowered, Serving, device_bytes
from tpu.operations import Operation, operations
from tpu.steps import STEPS


@dataclass(frozen=True)
class Sent:
    """All collectives of one kind along the same axes, in one step."""

    kind: str
    axes: str
    """Mesh axes, joined by +."""

    devices: int
    """In each group."""

    count: int
    bytes: float
    """Sent by one device."""

    concurrent: bool
    """Whether they run beside the core."""


@dataclass(frozen=True)
class Analysis:
    """What a step costs one device of a topology."""

    config: str
    step: str
    topology: str
    mesh: dict[str, int]
    memory: dict[str, float]
    """Bytes by kind."""

    hbm: float
    """Bytes that a device has."""

    flops: dict[str, float]
    """Of a step on one device: `model`, `expected` (with what is recomputed), `compiled`, and the last by
    kind of operation."""

    bytes: float
    """Through HBM, in one step."""

    collectives: tuple[Sent, ...]
    times: Times
    optimal_seconds: float
    """What XLA's cost analysis calls so: loops count once, an operation it does not know as minus one."""

    tokens: int
    """Of a step, over all devices."""

    peak_flops: float
    """Of a device."""

    gathered_experts: tuple[str, ...]
    """Instructions that gather the matrices of all experts along `expert`: there should be none."""

    unknown_loops: int
    """Loops whose number of runs is not in the program; they count nothing."""

    compile_seconds: float
    flags: str
    """LIBTPU_INIT_ARGS, which a run on these chips needs too."""

    @property
    def fits(self) -> bool:
        """Whether the devices hold it."""
        return sum(self.memory.values()) <= self.hbm

    def mfu(self, seconds: float) -> float:
        """Model FLOP/s over the peak, if a step takes so long."""
        return self.flops["model"] / seconds / self.peak_flops

    def json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        predicted = {
            "fits": self.fits,
            "bound": self.times.bound,
            "mfu_roofline": self.mfu(self.times.roofline),
            "mfu_compiler": self.mfu(self.times.compiler),
            "compiled_over_expected": self.flops["compiled"] / self.flops["expected"],
        }
        return dataclasses.asdict(self) | predicted


class DoesNotFitError(UserError):
    """The compiler found that a device has too little memory."""


def analyse(experiment: Experiment, topology: str, step: str, serving: Serving) -> tuple[Analysis, str]:
    """Compile and analyse one step of an experiment, and give its HLO. Sets the mesh.

    Raises:
        UserError: no such topology, a mesh or batch that it cannot share, or too little memory.
    """
    chip = chip_of(topology)
    devices = describe(topology)
    STEPS[step].check(experiment, serving, len(devices))
    mesh = make_mesh(experiment.mesh, devices)
    jax.set_mesh(mesh)
    lowered = STEPS[step].lower(experiment, serving)
    started = time.perf_counter()
    compiled = compile_program(lowered)
    seconds = time.perf_counter() - started
    places = [Place(tuple(d.coords), d.core_on_chip) for d in mesh.devices.flat]
    named = Mesh(dict(mesh.shape))
    program = compiled.as_text() or ""
    module = Module.parse(program)
    found = operations(module, named, lowered.even)
    loops = [(where, i) for where, i in module.loops() if module.trip_count(where, i) is None]
    analysis = Analysis(
        experiment.name,
        step,
        topology,
        named.axes,
        _memory(compiled, lowered),
        chip.hbm_bytes / chip.devices,
        _flops(found, lowered, len(devices)),
        sum(o.times * o.bytes for o in found),
        tuple(sorted(_sent(found), key=lambda s: -s.bytes)),
        times(module, found, chip, places),
        float((compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)),
        lowered.tokens,
        chip.peak_flops / chip.devices,
        _gathered_experts(module, named, experiment.model),
        len(loops),
        seconds,
        os.environ["LIBTPU_INIT_ARGS"],
    )
    return analysis, program


def describe(topology: str) -> list[Any]:
    """The devices of a topology, none of which need be here.

    Raises:
        UserError: libtpu is missing or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is missing, the compiler for TPUs; run with `uv run --extra tpu`")
    from jax.experimental import topologies

    chip = chip_of(topology)
    os.environ.setdefault("LIBTPU_INIT_ARGS", chip.flags)  # before libtpu is loaded
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chip_config_name=chip.configuration
        )
        return list(described.devices)
    except Exception as error:  # of libtpu, whatever it may be
        raise UserError(f"--topology {topology!r}: {one_line(error)[:200]}") from error


def compile_program(lowered: Lowered) -> jax.stages.Compiled:
    """The program of a device.

    Raises:
        DoesNotFitError: it needs more memory than a device has.
        UserError: the topology cannot send what it sends.
    """
    try:
        return lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "limited ICI routing" in str(error):
            raise UserError(
                "model.moe.dispatch.exchange: XLA sends no ragged buffers over this topology; "
                "take Auto() or AllToAll()"
            ) from error
        sizes = re.findall(r"(?:Used |of |\()([\d.]+[MGT])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        raise DoesNotFitError(
            f"does not fit: needs {sizes[0]}iB of a device's {sizes[1]}iB; "
            "raise train.accumulation, or take another mesh or more chips"
        ) from error


def _gathered_experts(module: Module, mesh: Mesh, model: TransformerConfig) -> tuple[str, ...]:
    if not model.moe_layers:
        return ()
    width = model.moe.latent_width or model.width
    shapes = [(number, width, hidden) for number, hidden in model.moe.width_classes]
    return tuple(name for dims in shapes for name in gathered(module, mesh, "expert", *dims))


def _memory(compiled: jax.stages.Compiled, lowered: Lowered) -> dict[str, float]:
    stats: Any = compiled.memory_analysis()
    held = {name: float(device_bytes(shapes)) for name, shapes in lowered.held.items() if shapes is not None}
    return held | {
        "batch and counters": max(0.0, stats.argument_size_in_bytes - sum(held.values())),
        "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
        "activations and gradients": float(stats.temp_size_in_bytes),
        "code": float(stats.generated_code_size_in_bytes),
    }


def _flops(found: list[Operation], lowered: Lowered, devices: int) -> dict[str, float]:
    flops = {
        "model": lowered.model_flops / devices,
        "expected": lowered.expected_flops / devices,
        "compiled": sum(o.times * o.flops for o in found),
    }
    for kind in ("matrix", "experts", "attention", "collective"):
        flops[kind] = sum(o.times * o.flops for o in found if o.kind == kind)
    return flops


def _sent(found: list[Operation]) -> list[Sent]:
    groups: dict[Any, list[tuple[int, int]]] = {}
    for o in found:
        if (c := o.collective) is not None:
            key = (c.kind, "+".join(c.axes), len(c.group), c.concurrent)
            groups.setdefault(key, []).append((o.times, c.sent))
    return [
        Sent(
            kind, axes, devices, sum(n for n, _ in each), float(sum(n * sent for n, sent in each)), concurrent
        )
        for (kind, axes, devices, concurrent), each in groups.items()
    ]
