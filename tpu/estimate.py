"""How long a compiled step should take on its chips, and what bounds it.

The program comes with its schedule, so time is counted along it: one operation after the other on the core,
collectives that were begun early beside them on the links. Two answers, since the truth lies between:

    roofline   each operation at the chip's peak FLOP/s or HBM bandwidth, whichever takes longer
    compiler   no faster than the compiler's own `estimated_cycles`, where it gives any (kernels and
               collectives have none); pessimistic about element-wise passes

Left out of both: imbalance of experts, launch and latency of every operation, kernels short of the peak,
input, checkpoints, stragglers, failures.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tpu.chips import Chip, Place, seconds
from tpu.collectives import STEPS_END, continues
from tpu.hlo import Computation, Instruction, Module
from tpu.operations import Operation


@dataclass(frozen=True)
class Times:
    """Seconds of one step on one device."""

    matrix: float
    """Of all FLOPs at the peak."""

    hbm: float
    """Of all HBM bytes at full bandwidth."""

    ici: float
    """Of all collectives, one after the other."""

    exposed: float
    """The part of those that the core waits for, in the roofline."""

    roofline: float
    """Of the whole step."""

    compiler: float
    """Of the whole step."""

    @property
    def bound(self) -> str:
        """What takes longest by itself."""
        return max(("compute", self.matrix), ("HBM", self.hbm), ("ICI", self.ici), key=lambda each: each[1])[
            0
        ]


def times(module: Module, found: Sequence[Operation], chip: Chip, places: Sequence[Place]) -> Times:
    """Estimate a step.

    Args:
        module: the program.
        found: its operations.
        chip: what it runs on.
        places: of its partitions on the torus.
    """
    peak, bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    links = {o.name: seconds(chip, o.collective, places) for o in found if o.collective}

    def roofline(o: Operation) -> float:
        # A collective's own pass through HBM is part of it.
        return 0.0 if o.collective else max(o.flops / peak, o.bytes / bandwidth)

    def compiler(o: Operation) -> float:
        return 0.0 if o.collective and not o.flops else max(roofline(o), o.cycles / chip.clock)

    by_name = {o.name: o for o in found}
    on_core = {name: {n: f(o) for n, o in by_name.items()} for name, f in (("r", roofline), ("c", compiler))}
    total, waited = _along(module, by_name, links, on_core["r"])
    return Times(
        sum(o.times * o.flops for o in found) / peak,
        sum(o.times * o.bytes for o in found) / bandwidth,
        sum(o.times * links[o.name] for o in found if o.collective),
        waited,
        total,
        _along(module, by_name, links, on_core["c"])[0],
    )


def _along(module: Module, by_name: dict[str, Operation], links, core) -> tuple[float, float]:
    """Seconds along the schedule, and those of them in which the core waits for links."""

    def run(computation: Computation) -> tuple[float, float]:
        now = free = waited = 0.0
        begun: dict[str, float] = defaultdict(float)
        for i in computation.instructions.values():
            inner = _inner(module, computation, i)
            for body, trips in inner:
                spent, idle = run(body)
                now, waited = now + trips * spent, waited + trips * idle
            operation = by_name.get(i.name)
            ready = max((begun[name] for name in i.operands), default=0.0)
            if i.opcode in ("get-tuple-element", "bitcast") or i.opcode.endswith("-update") or continues(i):
                begun[i.name] = ready
            if i.opcode.endswith("-done") or i.name.startswith(STEPS_END):  # a copy has no time of its own
                waited, now = waited + max(0.0, ready - now), max(now, ready)
            elif operation is None:
                continue
            elif operation.collective and operation.collective.concurrent:
                free = max(now, free) + links[i.name]
                begun[i.name] = free
            elif operation.collective:
                # Fused with products, it runs beside them; alone, it is waited for.
                beside = core[i.name]
                start = max(now, free)
                free = start + links[i.name]
                waited, now = waited + max(0.0, free - now - beside), max(free, now + beside)
            else:
                now += core[i.name]
        return now, waited

    return run(module.computations[module.entry])


def _inner(module: Module, computation: Computation, i: Instruction) -> list[tuple[Computation, int]]:
    if i.opcode == "while":
        return [(module.body(i), module.trip_count(computation, i) or 0)]
    if i.opcode == "call":
        return [(module.computations[name], 1) for name in i.called]
    if i.opcode == "conditional":
        return [(branch, 1) for branch in module.branches(i)]
    return []
