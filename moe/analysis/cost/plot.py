"""A cost report as a picture: one roofline a chip, with what the model does on it."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.typing import RcKeyType

from moe.analysis.cost.report import CostReport
from moe.analysis.cost.roofline import Timed, Workload
from moe.analysis.cost.table import scaled
from moe.analysis.hardware import Hardware

STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
}
COLUMNS = 4
# Okabe and Ito, "Color universal design".
TRAIN, PREFILL, DECODE = "#D55E00", "#009E73", "#0072B2"
MEMORY_SIDE = "#f3f0e7"


def draw(report: CostReport, path: Path) -> None:
    """Write the picture."""
    with mpl.rc_context(STYLE):
        figure(report).savefig(path)


def figure(report: CostReport) -> Figure:
    """A panel a chip: share of its peak against FLOPs a byte. The roof is the chip's, the marks the model's.

    A mark lies below the roof as far as some parts of the model are bound by memory and others by arithmetic.
    """
    columns = min(COLUMNS, len(report.times))
    rows = -(-len(report.times) // columns)
    made = Figure(figsize=(max(3.2 * columns, 6.4), 2.7 * rows + 1.2), layout="constrained")
    panels = made.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    intensities = [w.work.intensity for w in report.workloads]
    ridges = [hardware.ridge for hardware in report.times]
    span = (min(intensities) / 2, max(*intensities, *ridges) * 3)
    shares = [
        share(w, t, h)
        for h, times in report.times.items()
        for w, t in zip(report.workloads, times, strict=True)
    ]
    for axes, (hardware, times) in zip(panels.flat, report.times.items(), strict=False):
        _roof(axes, hardware, span)
        _marks(axes, report.workloads, times, hardware)
        _rates(axes, report.workloads, times)
        axes.set(xscale="log", yscale="log", xlim=span, ylim=(min(shares) / 2, 2.2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.grid(alpha=0.18, lw=0.6)
    for axes in panels.flat[len(report.times) :]:
        axes.set_axis_off()
    context, weights = report.setup.context, report.setup.weights
    made.suptitle(
        f"{report.setup.name}: what binds it, at {context:,} tokens of context and {weights} weights",
        fontsize=12,
    )
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the chip's peak")
    for axes in panels.flat[max(0, len(report.times) - columns) : len(report.times)]:
        axes.set_xlabel("FLOPs a byte")
    made.legend(handles=_legend(report), loc="outside lower center", ncols=5, frameon=False)
    return made


def share(workload: Workload, timed: Timed, hardware: Hardware) -> float:
    """Of a chip's peak that a workload gets, as predicted."""
    return workload.work.flops / timed.seconds / timed.chips / hardware.peak_flops


def _roof(axes: Axes, hardware: Hardware, span: tuple[float, float]) -> None:
    x = np.geomspace(*span, 400)
    roof = np.minimum(x / hardware.ridge, 1.0)
    axes.plot(x, roof, color="#333333", lw=1.6, zorder=2)
    axes.axvspan(span[0], hardware.ridge, color=MEMORY_SIDE, zorder=0)
    axes.set_title(
        f"$\\bf{{{hardware.name}}}$   {scaled(hardware.peak_flops)}F/s, {scaled(hardware.bandwidth)}B/s",
        loc="left",
    )


def _marks(axes: Axes, workloads: tuple[Workload, ...], times: tuple[Timed, ...], hardware: Hardware) -> None:
    points = [(w.work.intensity, share(w, t, hardware)) for w, t in zip(workloads, times, strict=True)]
    decoded = points[2:]
    if decoded:
        line: dict[str, Any] = {"ms": 5.5, "lw": 0.9, "mec": "white", "mew": 0.7}
        axes.plot(*zip(*decoded, strict=True), "o-", color=DECODE, zorder=4, **line)
    for workload, (x, y) in zip(workloads[2:], decoded, strict=True):
        axes.annotate(
            f"{workload.tokens:,}", (x, y), (5, -9), textcoords="offset points", fontsize=7, color=DECODE
        )
    for (x, y), colour, marker in zip(points[:2], (TRAIN, PREFILL), "s^", strict=False):
        axes.plot(x, y, marker, color=colour, ms=7.5, mec="white", mew=0.8, zorder=5)


def _rates(axes: Axes, workloads: tuple[Workload, ...], times: tuple[Timed, ...]) -> None:
    """Tokens a second and chip, in the empty corner below the roof."""
    shown = [*zip(workloads[:2], times[:2], (TRAIN, PREFILL), strict=False)]
    shown += [*zip(workloads[2:], times[2:], len(times[2:]) * [DECODE], strict=True)][-1:]
    lines = [
        (f"{workload.name}: {scaled(timed.tokens_per_second_per_chip)}", colour)
        for workload, timed, colour in shown
    ]
    for i, (text, colour) in enumerate(reversed([("tokens a second and chip", "#555555"), *lines])):
        axes.text(
            0.985, 0.03 + 0.075 * i, text, color=colour, fontsize=8, ha="right", transform=axes.transAxes
        )


def _legend(report: CostReport) -> list[Line2D]:
    names = [workload.name for workload in report.workloads[:2]]
    looks: dict[str, Any] = {"ls": "", "mec": "white"}
    found = [
        Line2D([], [], marker=marker, color=colour, ms=8, label=name, **looks)
        for name, colour, marker in zip(names, (TRAIN, PREFILL), "s^", strict=False)
    ]
    if len(report.workloads) > 2:
        found.append(
            Line2D([], [], marker="o", color=DECODE, ms=7, mec="white", lw=0.9, label="decode, by batch")
        )
    found.append(Line2D([], [], color="#333333", lw=1.6, label="the chip's roof"))
    return [
        *found,
        Line2D([], [], marker="s", color=MEMORY_SIDE, ms=9, label="memory binds", ls="", mec="#bbbbbb"),
    ]
