"""What `docs/performance.md` shows of a run: ours against the best of the others, in one table."""

import re
from typing import Any

from benchmarks.gpu.cells import part, ratio, row, tera
from benchmarks.gpu.figures import OURS, Figures, bmm_rate, dense_rates, square_rate
from benchmarks.gpu.report import measured_on
from benchmarks.gpu.shapes import ROUTINGS

PASSES = ("forward", "data gradient", "weight gradient")


def grouped_matmul_summary(results: dict[str, Any]) -> str:
    """Of every product: ours in TF/s, over the dense product of equal FLOPs, and over `torch._grouped_mm`."""
    figures = Figures(results)
    dense = dense_rates(figures)
    lines = [
        f"- {measured_on(results)}",
        "",
        "Each cell: TF/s, of the dense product of equal FLOPs, over `torch._grouped_mm`.",
        "",
        row(["product", "groups", *PASSES]),
        row(["---"] * 5),
    ]
    for case in figures.names("case", leave_out=("dense 8192",)):
        for routing in ROUTINGS:
            cells = []
            for passed in PASSES:
                mine = figures.rate(OURS, case, routing, passed)
                theirs = figures.rate("torch._grouped_mm", case, routing, passed)
                cells.append(f"{tera(mine)}, {part(mine, dense.get(case))}, {ratio(mine, theirs)}")
            lines.append(row([case, "equal" if routing == "uniform" else routing, *cells]))
    return "\n".join(lines) + "\n"


def moe_layer_summary(results: dict[str, Any]) -> str:
    """Of every layer and pass: ours in TF/s, over the others, over the products alone."""
    figures = Figures(results)
    square = square_rate(figures)
    columns = [
        "TF/s",
        "Zipf / uniform",
        "over SonicMoE, uniform",
        "Zipf",
        "over transformers, uniform",
        "Zipf",
    ]
    lines = [
        f"- {measured_on(results)}",
        "",
        row(["layer", "pass", *columns, "of bmm", "of 8192³"]),
        row(["---"] * 10),
    ]
    for shape in [case for case in figures.names("case") if not case.endswith((" up", " down", " 8192"))]:
        for passed in ("forward", "forward + backward"):
            mine = [figures.rate(OURS, shape, routing, passed) for routing in ROUTINGS]
            cells = [tera(mine[0]), ratio(mine[1], mine[0])]
            for peer in ("SonicMoE", "transformers"):
                theirs = [figures.rate(peer, shape, routing, passed) for routing in ROUTINGS]
                cells += map(ratio, mine, theirs)
            cells += [part(mine[0], bmm_rate(figures, shape, passed)), part(mine[0], square)]
            lines.append(row([shape, passed, *cells]))
    return "\n".join(lines) + "\n"


def with_summary(page: str, label: str, summary: str) -> str:
    """The page with what stands between `<!-- LABEL -->` and `<!-- end -->` replaced; as it is without."""
    between = re.compile(rf"(<!-- {re.escape(label)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    return between.sub(lambda found: found.group(1) + "\n" + summary + "\n", page)
