"""Results of `grouped_matmul.py` and `moe_layer.py` as Markdown pages."""

from typing import Any

from benchmarks.gpu.cells import gibi, part, ratio, row, tera
from benchmarks.gpu.figures import (
    DENSE,
    KNOWN,
    OURS,
    PEAK,
    PRODUCTS,
    Figures,
    bmm_rate,
    dense_rates,
    rate,
    square_rate,
)
from benchmarks.gpu.shapes import ROUTINGS


def grouped_matmul_page(results: dict[str, Any]) -> str:
    """The page of `grouped_matmul.py`."""
    figures = Figures(results)
    dense, square = dense_rates(figures), square_rate(figures)
    others = figures.names("program", leave_out=(OURS, *DENSE))
    sections = [_head(results, figures, "Grouped matrix products", "grouped_matmul")]
    for routing in ROUTINGS:
        lines = [
            f"## {'Equal groups' if routing == 'uniform' else 'Zipf-distributed groups'}",
            "",
            f"TF/s. Dense is the faster of XLA and torch at equal FLOPs{_equal(routing)}.",
            "",
            row(
                [
                    "product",
                    OURS,
                    *others,
                    "dense",
                    "of dense",
                    "of bmm",
                    "of `_grouped_mm`",
                    "of 8192³",
                    "error",
                ]
            ),
            row(["---"] * (len(others) + 8)),
        ]
        for case in figures.names("case", leave_out=("dense 8192",)):
            for passed in ("forward", "data gradient", "weight gradient"):
                ours = figures.find(OURS, case, routing, passed)
                mine = rate(ours) if ours else None
                theirs = {name: figures.rate(name, case, _routing(name, routing), passed) for name in others}
                lines.append(
                    row(
                        [
                            f"{case}, {passed}",
                            tera(mine),
                            *map(tera, theirs.values()),
                            tera(dense.get(case)),
                            part(mine, dense.get(case)),
                            part(mine, theirs.get("torch.bmm")),
                            part(mine, theirs.get("torch._grouped_mm")),
                            part(mine, square),
                            f"{ours['error']:.1e}" if ours else "–",
                        ]
                    )
                )
        sections.append("\n".join(lines))
    return "\n\n".join([*sections, _grouped_error_note(), *failures(figures)]) + "\n"


def moe_layer_page(results: dict[str, Any]) -> str:
    """The page of `moe_layer.py`."""
    figures = Figures(results)
    sections = [_head(results, figures, "Whole MoE layers", "moe_layer")]
    sections += [_layer_section(figures, passed) for passed in ("forward", "forward + backward")]
    return "\n\n".join([*sections, _layer_note(), *failures(figures)]) + "\n"


def _layer_section(figures: Figures, passed: str) -> str:
    programs = figures.names("program", leave_out=PRODUCTS)
    shapes = [case for case in figures.names("case") if not case.endswith((" up", " down", " 8192"))]
    times = "6" if passed == "forward" else "18"
    columns = ["uniform", "Zipf", "Zipf / uniform", "ours over it, uniform", "Zipf", "of bmm", "of 8192³"]
    columns += ["memory, GiB"] + (["saved, GiB", "error y", "x", "w"] if passed != "forward" else [])
    lines = [
        f"## {passed.capitalize()}",
        "",
        f"Useful TF/s, {times} T K d f operations. Of bmm: of the rate of the layer's products alone.",
        "",
        row(["layer", "library", *columns]),
        row(["---"] * (len(columns) + 2)),
    ]
    for shape in shapes:
        bmm, square = bmm_rate(figures, shape, passed), square_rate(figures)
        mine = [figures.rate(OURS, shape, routing, passed) for routing in ROUTINGS]
        for name in programs:
            records = [figures.find(name, shape, routing, passed) for routing in ROUTINGS]
            rates = [rate(record) if record else None for record in records]
            cells = [*map(tera, rates), ratio(rates[1], rates[0])]
            cells += ["", ""] if name == OURS else map(ratio, mine, rates)
            cells += [part(rates[0], bmm), part(rates[0], square), *_layer_costs(records[0], passed)]
            lines.append(row([shape, name, *cells]))
        alone = ["products alone, `torch.bmm`", tera(bmm), *[""] * 5, part(bmm, square)]
        lines.append(row([shape, *alone, *[""] * (len(columns) - 7)]))
        for label, known in KNOWN.items():
            if (shape, passed) in known and not figures.find("SonicMoE", shape, "uniform", passed):
                lines.append(row([shape, label, known[shape, passed], *[""] * (len(columns) - 1)]))
    return "\n".join(lines)


def _layer_costs(record: dict[str, Any] | None, passed: str) -> list[str]:
    """Memory, and with the backward pass what is saved for it and the errors."""
    if not record:
        return ["–"] * (1 if passed == "forward" else 5)
    working, backward = record["working_bytes"], passed != "forward"
    memory = [gibi(None if working is None else working + record["argument_bytes"])]
    errors = [f"{record['error'][name]:.1e}" for name in "yxw"] if backward else []
    return [*memory, *([gibi(record["saved_bytes"])] if backward else []), *errors]


def _head(results: dict[str, Any], figures: Figures, title: str, command: str) -> str:
    squares = [record for record in figures.records if record["case"] == "dense 8192"]
    told = ", ".join(f"{record['program']} {tera(rate(record))} TF/s" for record in squares)
    return f"""# {title} on a GPU

Made by `uv run benchmarks/{command}.py`, whose docstring says what is measured and how.

- {measured_on(results)}
- Medians over {results["rounds"]} rounds of at least 20 calls each
- Dense 8192³ product in the same run: {told or "not measured"} (datasheet peak {PEAK / 1e12:.0f})"""


def measured_on(results: dict[str, Any]) -> str:
    """Date, commit, versions and hardware, in two lines of a list."""
    versions = {"python": results["python"]}
    for told in results["programs"]:
        versions |= told.get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    card = ", ".join(f"{name} {value}" for name, value in results["gpu"].items()) or "no GPU: a trial"
    modified = " and uncommitted changes" if results["modified"] else ""
    return f"""{results["date"]}, commit {results["commit"]}{modified}; {named}
- {card}; {results["hardware"]["processor"]}"""


def _grouped_error_note() -> str:
    return """Error: distance of ours from the float32 result over its norm, from the same bfloat16 inputs: of
the products over the first rows of every expert, of the weight gradient over some columns of two experts."""


def _layer_note() -> str:
    return """Memory is the most that is held: tokens, weights, results, gradients and everything in between.
Saved is what a forward pass keeps for the backward pass besides tokens and weights. Error: distance from the
float32 result over its norm, for the same choice of experts: of the output and of the tokens' gradient over
some tokens, of the gradients of the most used expert's matrices over all. All three under uniform routing."""


def failures(figures: Figures) -> list[str]:
    """A section that says what was not measured and why, if anything was not."""
    if not figures.failed:
        return []
    named = ("program", "case", "pass", "routing")
    lines = [
        f"- {', '.join(record[key] for key in named if key in record)}: {record['failed']}"
        for record in figures.failed
    ]
    return ["\n".join(["## Not measured", "", *lines])]


def _routing(program: str, routing: str) -> str:
    """`torch.bmm` knows equal groups only, and is the measure for the others too."""
    return "uniform" if program == "torch.bmm" else routing


def _equal(routing: str) -> str:
    return "" if routing == "uniform" else "; `torch.bmm` has equal groups here too"
