"""The picture of `scaling`: the same losses over what they cost to hold, to train and to serve."""

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from moe.ablation.scaling import BATCHES, Point, Scaling

DENSE = "#777777"


def draw_scaling(found: Scaling) -> Figure:
    """Loss over parameters with the fit, over the time of a step, over the bytes of a token made."""
    batch = len(BATCHES) - 1
    costs: list[tuple[str, Callable[[Point], float], str]] = [
        ("parameters", lambda p: p.total_params, ""),
        ("time of a train step", lambda p: p.step_seconds, "s"),
        (f"bytes read for a token, {BATCHES[batch]} at once", lambda p: p.decode_bytes[batch], "B"),
    ]
    figure = Figure(figsize=(11, 3.6))
    panels = figure.subplots(1, len(costs), sharey=True)
    for axes, (label, cost, unit) in zip(panels, costs, strict=True):
        _points(axes, found, cost)
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
    _fit(panels[0], found)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.94))
    figure.suptitle(headline(found), fontsize=10)
    return figure


def headline(found: Scaling) -> str:
    """What the fit says, and how much the best row gains."""
    fit, best = found.fit, min(found.points, key=lambda p: p.loss.mean)
    words = (
        f"Twice the experts: loss {fit.of_doubling_experts.mean:+.1%}; "
        f"experts twice as fine: {fit.of_doubling_granularity.mean:+.1%}"
    )
    if found.dense:
        gain = best.loss.mean - found.dense.loss.mean
        words += f"; {best.name}: {gain:+.3f} nats to dense at equal active compute"
    return words


def _points(axes: Axes, found: Scaling, cost: Callable[[Point], float]) -> None:
    for granularity, colour in _colours(found).items():
        mine = sorted((p for p in found.points if p.granularity == granularity), key=lambda p: p.experts)
        axes.plot([cost(p) for p in mine], [p.loss.mean for p in mine], lw=1, alpha=0.5, color=colour)
        for p in mine:
            seeds = [cost(p)] * len(p.losses)
            axes.plot(seeds, p.losses, "o", ms=3, mew=0, alpha=0.5, color=colour)
            axes.plot(cost(p), p.loss.mean, "o", ms=5, color=colour)
            told = {"textcoords": "offset points", "xytext": (0, 5), "ha": "center"}
            axes.annotate(f"{p.experts}", (cost(p), p.loss.mean), fontsize=6, color=colour, **told)
    if found.dense:
        axes.axhline(found.dense.loss.mean, color=DENSE, lw=1, ls="--")
        axes.plot(cost(found.dense), found.dense.loss.mean, "D", ms=5, color=DENSE)
        told = {"textcoords": "offset points", "xytext": (7, -10)}
        axes.annotate("dense", (cost(found.dense), found.dense.loss.mean), fontsize=8, color=DENSE, **told)


def _fit(axes: Axes, found: Scaling) -> None:
    """Lines of the fit, drawn over parameters: these grow in a straight line with the experts."""
    for granularity, colour in _colours(found).items():
        mine = sorted((p for p in found.points if p.granularity == granularity), key=lambda p: p.experts)
        expansion = np.geomspace(mine[0].expansion, mine[-1].expansion, 40)
        params = np.interp(expansion, [p.expansion for p in mine], [p.total_params for p in mine])
        label = f"G = {granularity:g}: {granularity:g} of E experts"
        fitted = [found.fit.loss(e, granularity) for e in expansion]
        axes.plot(params, fitted, ls=":", lw=1.2, color=colour)
        axes.plot([], [], "o-", ms=5, color=colour, label=label)


def _colours(found: Scaling) -> dict[float, tuple]:
    kinds = sorted({p.granularity for p in found.points})
    places = np.linspace(0.1, 0.8, len(kinds))
    return {kind: mpl.colormaps["viridis"](place) for kind, place in zip(kinds, places, strict=True)}
