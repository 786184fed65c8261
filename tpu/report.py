"""An analysis as text."""

from collections.abc import Iterable, Mapping, Sequence

from moe.analysis.hardware import GIB
from tpu.analyse import Analysis


def page(a: Analysis) -> str:
    """What `tpu/compile.py` prints of one program."""
    shape = layout(a.mesh)
    free = a.hbm - sum(a.memory.values())
    verdict = (
        f"fits, {free / GIB:.1f} GiB free" if a.fits else f"does not fit: {-free / GIB:.1f} GiB too much"
    )
    t, f = a.times, a.flops
    ops, ops_unit = _unit(f["expected"], {"T": 1e12, "G": 1e9, "M": 1e6})
    tick, ticks = _unit(t.roofline, {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6})
    lines = [
        f"{a.config}  {a.step} step  {a.topology}  {shape}  (compiled in {a.compile_seconds:.0f} s)",
        "",
        f"memory of a device, GiB of {a.hbm / GIB:.1f}",
        *table([(name, f"{size / GIB:.2f}") for name, size in a.memory.items()]),
        f"  {verdict}",
        "",
        f"FLOPs of a device and step, {ops_unit}",
        *table(
            [
                ("of the model", f"{f['model'] / ops:.2f}"),
                ("with what is computed beyond", f"{f['expected'] / ops:.2f}"),
                ("compiled", f"{f['compiled'] / ops:.2f}", f"{f['compiled'] / f['expected'] - 1:+.2%}"),
                *((f"  {kind}", f"{f[kind] / ops:.2f}") for kind in ("matrix", "experts", "attention")),
            ]
        ),
        f"HBM bytes of a device and step  {a.bytes / 1e9:.1f} GB",
        "",
        "collectives of a step, GB sent by a device",
        *table(
            [
                (
                    s.kind,
                    s.axes,
                    f"{s.devices} devices",
                    f"{s.count} x",
                    f"{s.bytes / 1e9:.3f}",
                    beside(s.concurrent),
                )
                for s in a.collectives
            ]
        ),
        "",
        f"{ticks} of a step",
        *table(
            [
                ("FLOPs at the peak", f"{t.matrix / tick:.3f}"),
                ("HBM at full bandwidth", f"{t.hbm / tick:.3f}"),
                (
                    "collectives at full bandwidth",
                    f"{t.ici / tick:.3f}",
                    f"{t.exposed / tick:.3f} of them waited for",
                ),
                ("predicted, rooflines", f"{t.roofline / tick:.3f}", f"MFU {a.mfu(t.roofline):.1%}"),
                ("predicted, compiler's cycles", f"{t.compiler / tick:.3f}", f"MFU {a.mfu(t.compiler):.1%}"),
            ]
        ),
        f"bound by {t.bound}; {a.tokens / t.compiler:,.0f} to {a.tokens / t.roofline:,.0f} tokens/s in all",
    ]
    if a.flags:
        lines.append(f"compiled with LIBTPU_INIT_ARGS={a.flags!r}; a run needs them too")
    if a.gathered_experts:
        lines.append(f"note: every device gathers all experts: {', '.join(a.gathered_experts)}")
    if a.unknown_loops:
        lines.append(f"note: {a.unknown_loops} loops run only if loads are uneven; they count nothing")
    return "\n".join(lines)


def _unit(number: float, units: dict[str, float]) -> tuple[float, str]:
    """The largest of these units in which the number is at least one, and its name; else the smallest."""
    name = next((name for name, size in units.items() if number >= size), list(units)[-1])
    return units[name], name


def layout(mesh: Mapping[str, int]) -> str:
    """The axes along which there are several devices."""
    return " x ".join(f"{name} {length}" for name, length in mesh.items() if length > 1) or "one device"


def beside(concurrent: bool) -> str:
    """Of a collective."""
    return "beside the core" if concurrent else ""


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns in line: the first to the left, numbers to the right."""
    rows = [tuple(row) for row in rows]
    count = max((len(row) for row in rows), default=0)
    filled = [row + ("",) * (count - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in filled) for i in range(count)]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() else text.ljust(width)

    return ["  " + "  ".join(map(cell, row, widths)).rstrip() for row in filled]
