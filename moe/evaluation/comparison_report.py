"""A comparison of two models: as text, as JSON, and as one HTML file with pictures."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from moe.ablation.markdown import NOTHING, scaled, table
from moe.ablation.plots import GREY, STYLE, VERDICTS
from moe.analysis.cost.table import duration
from moe.page import finite, html_page

MARKS = {"worse": "WORSE", "better": "better", "same": "", "not tested": ""}
CAPTIONS = {
    "quality.png": "Bits per byte, after less before, with 95 % t-interval over sequences. Left is better.",
    "costs.png": "Costs and times, after over before, on a logarithmic scale. Left of one is less.",
}


def write(folder: Path, found: dict[str, Any]) -> list[Path]:
    """compare-NAME.json and .html, each whole or not at all, into `folder`, which is made where missing."""
    folder.mkdir(exist_ok=True)
    before, after = (side["name"] for side in found["sides"])
    name = f"compare-{before}".replace("/", "-").replace(" ", "-")
    if " in " in after:
        name += f"-{after.rpartition(' in ')[2]}"
    pictures = draw(found)
    shown = [f"![{CAPTIONS[picture]}]({picture})\n\n*{CAPTIONS[picture]}*\n" for picture in pictures]
    page = "\n".join([text(found), "## Pictures\n", *shown])
    written = []
    for suffix, contents in (
        (".json", json.dumps(finite(found), indent=1) + "\n"),
        (".html", html_page(f"{after} against {before}", page, pictures)),
    ):
        path, temporary = folder / f"{name}{suffix}", folder / f"{name}.tmp"
        temporary.write_text(contents, encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written


def text(found: dict[str, Any]) -> str:
    """The report as Markdown, which reads as it is."""
    before, after = found["sides"]
    trained = "; ".join(
        f"{side['name']}: step {side['step']:,}, {side['tokens_trained']:,} tokens"
        for side in (before, after)
    )
    worse = ", ".join(found["regressions"]) or "none"
    blocks = [
        f"# {after['name']} against {before['name']}\n",
        f"{trained}.\n",
        f"**Regressions: {worse}.** {found['rule']}\n",
        "## Bits per byte\n",
        _quality(found),
        "" if found["same_data"] else "\nText or tokenizer differ, so that no sequence has its like.",
        "\n## Costs\n",
        _costs(found),
        "\n## Speed here\n",
        _speed(found),
    ]
    return "\n".join(block for block in blocks if block) + "\n"


def draw(found: dict[str, Any]) -> dict[str, bytes]:
    """The pictures as PNG, by name."""
    rows = [*found["costs"], *(found["speed"] if isinstance(found["speed"], list) else [])]
    with mpl.rc_context(STYLE):
        return {"quality.png": _png(_differences(found["slices"])), "costs.png": _png(_ratios(rows))}


def _quality(found: dict[str, Any]) -> str:
    rows = []
    for name, q in found["slices"].items():
        interval = NOTHING if q["low"] != q["low"] else f"{q['low']:+.4f} to {q['high']:+.4f}"
        numbers = [f"{q['before']:.4f}", f"{q['after']:.4f}", f"{q['difference']:+.4f}", interval]
        rows.append([name, *numbers, f"{q['sequences']:,}", MARKS[q["verdict"]]])
    return table(["slice", "before", "after", "difference", "95 %", "sequences", ""], rows)


def _costs(found: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            scaled(row["before"]),
            scaled(row["after"]),
            f"{row['ratio']:.3f}",
            MARKS[row["verdict"]],
        ]
        for row in found["costs"]
    ]
    return table(["", "before", "after", "ratio", ""], rows)


def _speed(found: dict[str, Any]) -> str:
    if isinstance(found["speed"], str):
        return f"Not measured: {found['speed']}."
    rows = []
    for row in found["speed"]:
        cells = [row["name"]]
        for when in ("before", "after"):
            cells += [duration(row[when]), duration(row[f"p90_{when}"])]
            cells += [scaled(row[f"tokens_per_second_{when}"])]
        rows.append([*cells, f"{row['ratio']:.3f}", MARKS[row["verdict"]]])
    header = ["", "before", "p90", "tokens/s", "after", "p90", "tokens/s", "ratio of times", ""]
    return table(header, rows)


def _differences(slices: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(slices)))
    axes = figure.subplots()
    axes.axvline(0, color=GREY, lw=1)
    for place, q in enumerate(slices.values()):
        colour = VERDICTS.get(q["verdict"], GREY)
        axes.plot([q["low"], q["high"]], [place, place], color=colour, lw=1.6)
        axes.plot(q["difference"], place, "o", ms=5, color=colour)
    axes.set(
        yticks=range(len(slices)),
        yticklabels=list(slices),
        ylim=(len(slices) - 0.5, -0.5),
        xlabel="bits per byte, after less before",
    )
    axes.grid(axis="y", visible=False)
    return figure


def _ratios(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(rows)))
    axes = figure.subplots()
    axes.axvline(1, color=GREY, lw=1)
    for place, row in enumerate(rows):
        colour = VERDICTS.get(row["verdict"], GREY)
        axes.plot([1, row["ratio"]], [place, place], color=colour, lw=1.6)
        axes.plot(row["ratio"], place, "o", ms=5, color=colour)
        axes.annotate(f"{row['ratio']:.2f}", (row["ratio"], place), (6, -3), textcoords="offset points")
    axes.set(
        xscale="log",
        yticks=range(len(rows)),
        yticklabels=[row["name"] for row in rows],
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="after over before",
    )
    axes.margins(x=0.12)
    for level in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        level(FormatStrFormatter("%g"))
    axes.grid(axis="y", visible=False)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
