"""The pictures of a report: curves, load balance, quality against compute, differences to the baseline.

Every row keeps one colour through all pictures; the baseline is grey.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from moe.ablation.results import Result, Series
from moe.ablation.scaling import scaling
from moe.ablation.scaling_plot import draw_scaling
from moe.ablation.summary import SAME_COMPUTE, RowSummary, Sweep

GREY = "#777777"
VERDICTS = {"better": "#2a7f3f", "worse": "#b3362b", "equivalent": "#1b6ca8"}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
LEAST = 0.01  # of what a logarithmic scale shows; perfect balance, 0, would be infinitely far down
COLUMNS, PANEL = 4, (2.7, 2.0)  # panels in a line, inches of one


def draw(sweep: Sweep, folder: Path) -> dict[str, str]:
    """Draw all pictures that there are numbers for.

    Returns:
        Caption of each file written, in the order of the report.
    """
    found = scaling(sweep)
    pictures: dict[str, tuple[Callable[[Sweep], Figure | None], str]] = {
        "scaling.png": (
            lambda _: draw_scaling(found) if found else None,
            "Validation loss at equal active compute over what else it costs: a point for each row, with its "
            "number of experts, small ones for its seeds; dotted the fit. Bytes are those of weights in "
            "bfloat16 and of the cache, by the model of docs/compute.md.",
        ),
        "differences.png": (
            differences,
            "Difference to the baseline: mean over seeds and 95 % t-interval. The band is the margin of "
            "equivalence, left of zero is better; green better, red worse, blue equivalent, grey undecided.",
        ),
        "compute.png": (
            quality_against_compute,
            "Validation loss against active compute: mean over seeds and 95 % t-interval. Rows of equal "
            "compute stand side by side.",
        ),
        "loss.png": (
            loss_curves,
            "Validation loss over training: mean over seeds, band from the lowest to the highest seed; "
            "grey is the baseline. The first steps lie above the picture.",
        ),
        "gap.png": (
            loss_gaps,
            "The same, less the baseline's with the same seed: does a difference last?",
        ),
        "balance.png": (
            load_balance,
            "MaxVio over training (busiest expert's load above the mean load, mean over layers, one batch "
            "at a time, less than 0.01 drawn as that): mean and range over seeds; grey is the baseline.",
        ),
    }
    captions = {}
    with mpl.rc_context(STYLE):
        for name, (picture, caption) in pictures.items():
            figure = picture(sweep)
            (folder / name).unlink(missing_ok=True)
            if figure is not None:
                figure.savefig(folder / name, dpi=130)
                captions[name] = caption
    return captions


def colours(sweep: Sweep) -> Mapping[str, tuple | str]:
    """The colour of each row."""
    others = [row.name for row in sweep.rows if row.name != sweep.ablation.baseline_name]
    palette = mpl.colormaps["tab10" if len(others) <= 10 else "turbo"]
    places = range(10) if len(others) <= 10 else np.linspace(0.05, 0.95, len(others))
    dark = [tuple(0.8 * np.array(palette(place)[:3])) for place in places]  # also yellow and light green
    return {sweep.ablation.baseline_name: GREY} | dict(zip(others, dark, strict=False))


def differences(sweep: Sweep) -> Figure | None:
    """One line for each row: its paired difference with interval, and the margin."""
    rows = [row for row in sweep.rows if row.comparison and row.comparison.difference.count]
    if not rows:
        return None
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(rows)))
    axes = figure.subplots()
    margin = sweep.ablation.margin
    axes.axvspan(-margin, margin, color="#1b6ca8", alpha=0.1, lw=0)
    axes.axvline(0, color=GREY, lw=1)
    for place, row in enumerate(rows):
        assert row.comparison is not None
        difference, colour = row.comparison.difference, VERDICTS.get(row.comparison.verdict, GREY)
        axes.plot([difference.low, difference.high], [place, place], color=colour, lw=1.6)
        axes.plot(difference.mean, place, "o", ms=5, color=colour)
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[row.name + (" ≠" if row.other_compute else "") for row in rows],
        ylim=(len(rows) - 0.5, -0.5),
        xlabel=f"validation loss minus that of {sweep.ablation.baseline_name} (nats per token)",
    )
    axes.grid(axis="y", visible=False)
    return figure


def quality_against_compute(sweep: Sweep) -> Figure | None:
    """Loss over FLOPs per token, each row named at the right."""
    rows = sorted((row for row in sweep.rows if row.loss.count), key=lambda row: row.loss.mean)
    if not rows:
        return None
    figure = Figure(figsize=(8, max(3.6, 0.8 + 0.2 * len(rows))))
    axes = figure.subplots()
    colour = colours(sweep)
    places = _side_by_side([row.compute.forward_flops for row in rows])
    for row, place in zip(rows, places, strict=True):
        reach = 0 if math.isnan(row.loss.half_width) else row.loss.half_width
        axes.errorbar(place, row.loss.mean, reach, fmt="o", ms=5, lw=1, capsize=2, color=colour[row.name])
    low, high = min(row.compute.forward_flops for row in rows), max(row.compute.forward_flops for row in rows)
    if high / low < 1.05:  # or tiny differences would look large
        axes.set(xlim=(0.9 * low, 1.1 * high))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="active FLOPs per token, forward", ylabel="validation loss (nats per token)")
    _name_at_the_right(axes, rows, places, colour)
    return figure


def loss_curves(sweep: Sweep) -> Figure | None:
    """A panel for each row: validation loss over tokens, before the baseline's."""
    last = [v for r in sweep.results if len(r.losses.steps) > 1 for v in r.losses.after(0.2 * _steps(r))]
    return _panels(sweep, lambda result: result.losses, _limits(last), "validation loss", "linear")


def loss_gaps(sweep: Sweep) -> Figure | None:
    """A panel for each row: validation loss minus the baseline's of the same seed."""
    of_seed = {result.run.seed: result.losses for result in sweep.baseline.results}

    def gap(result: Result) -> Series:
        baseline = dict(zip(of_seed[result.run.seed].steps, of_seed[result.run.seed].values, strict=True))
        pairs = zip(result.losses.steps, result.losses.values, strict=True)
        found = [(step, value - baseline[step]) for step, value in pairs if step in baseline]
        return Series(tuple(step for step, _ in found), tuple(value for _, value in found))

    late = [v for r in sweep.results if len(gap(r).steps) > 1 for v in gap(r).after(0.2 * _steps(r))]
    return _panels(sweep, gap, _limits(late), "validation loss minus the baseline's", "linear")


def load_balance(sweep: Sweep) -> Figure | None:
    """A panel for each row: MaxVio over tokens, before the baseline's."""

    def visible(result: Result) -> Series:
        return Series(result.violations.steps, tuple(max(v, LEAST) for v in result.violations.values))

    return _panels(sweep, visible, None, "MaxVio", "log")


def _panels(
    sweep: Sweep,
    series: Callable[[Result], Series],
    limits: tuple[float, float] | None,
    label: str,
    scale: str,
) -> Figure | None:
    rows = [row for row in sweep.rows if any(len(series(result).steps) > 1 for result in row.results)]
    if not rows:
        return None
    lines = math.ceil(len(rows) / COLUMNS)
    columns = min(COLUMNS, len(rows))
    figure = Figure(figsize=(PANEL[0] * columns + 0.5, PANEL[1] * lines + 0.3))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    colour = colours(sweep)
    for row, axes in zip(rows, grid.flat, strict=False):
        for shown in dict.fromkeys((sweep.baseline.name, row.name)):
            of_row = next(each for each in sweep.rows if each.name == shown)
            _band(axes, [(result, series(result)) for result in of_row.results], colour[shown])
        axes.set(title=row.name, yscale=scale, ylim=limits)
        if scale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for column in range(columns):  # sharex keeps the numbers of hidden panels' columns
        lowest = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
    figure.supxlabel("training tokens", size=9)
    figure.supylabel(label, size=9)
    return figure


def _band(axes: Axes, runs: Sequence[tuple[Result, Series]], colour) -> None:
    """Mean over seeds where all of them that have begun have a value, and the range between them."""
    runs = [(result, series) for result, series in runs if series.steps]
    if not runs:
        return
    common = sorted(set.intersection(*(set(series.steps) for _, series in runs)))
    values = np.array([[dict(zip(s.steps, s.values, strict=True))[step] for step in common] for _, s in runs])
    train = runs[0][0].run.experiment
    tokens = np.array(common) * train.train.batch_size * train.data.sequence_length
    axes.plot(tokens, values.mean(0), color=colour, lw=1.4, marker="o" if len(common) < 12 else "", ms=2.5)
    axes.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)


def _side_by_side(flops: Sequence[float]) -> list[float]:
    """Where to draw points, so that those of equal FLOPs do not hide one another."""
    width = max(max(flops) - min(flops), 0.2 * min(flops))
    kind = [round(math.log(value) / SAME_COMPUTE) for value in flops]
    places = []
    for index, value in enumerate(flops):
        before, all_alike = kind[:index].count(kind[index]), kind.count(kind[index])
        places.append(value + 0.012 * width * (before - (all_alike - 1) / 2))
    return places


def _name_at_the_right(
    axes: Axes, rows: Sequence[RowSummary], points: Sequence[float], colour: Mapping
) -> None:
    """Names in a column beside the axes, in order of their loss, each with a line to its point."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    gap = (high - low) / max(len(rows), 14)
    places = spread([row.loss.mean for row in rows], gap)
    for row, point, place in zip(rows, points, places, strict=True):
        axes.annotate(
            row.name + (" ≠" if row.other_compute else ""),
            xy=(point, row.loss.mean),
            xytext=(1.02, place),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=colour[row.name],
            arrowprops={"arrowstyle": "-", "color": colour[row.name], "alpha": 0.35, "lw": 0.7},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved apart, so that neighbours keep a gap, around where they were.

    Places too close form a block, which lies centred on their mean; blocks that touch become one.
    """
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _start(blocks[-1], gap) < _start(blocks[-2], gap) + gap * len(blocks[-2]):
            merged = blocks.pop()
            blocks[-1] += merged
    return [_start(block, gap) + gap * index for block in blocks for index in range(len(block))]


def _start(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _limits(values: Sequence[float]) -> tuple[float, float] | None:
    """What shows most of the values: the early ones, far above, would flatten the rest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    pad = 0.05 * (max(finite) - min(finite)) or 0.05
    return min(finite) - pad, max(finite) + pad


def _steps(result: Result) -> int:
    return result.run.experiment.train.steps
