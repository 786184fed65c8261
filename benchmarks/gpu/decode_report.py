"""Results of `decode.py` as a Markdown page."""

from statistics import median, quantiles
from typing import Any

from benchmarks.gpu.cells import part, ratio, row, tera
from benchmarks.gpu.decode_shapes import FORMATS
from benchmarks.gpu.figures import OURS, Figures
from benchmarks.gpu.report import failures, measured_on

Record = dict[str, Any]


def decode_page(results: dict[str, Any]) -> str:
    """All tables."""
    figures = Figures(results)
    head = f"""# Generating on a GPU

Made by `uv run benchmarks/decode.py`, whose docstring says what is measured and how.

- {measured_on(results)}
- {parts_measured(results)}
- Medians over {results["rounds"]} rounds
- A copy in the same run: {tera(copy_rate(figures))} TB/s, read and written"""
    return "\n\n".join([head, decode_summary(results).rstrip(), *failures(figures)]) + "\n"


def decode_summary(results: dict[str, Any]) -> str:
    """The tables for which there are figures."""
    figures = Figures(results)
    tables = [steps(figures), prompts(figures), models(figures), requests(figures)]
    return "\n\n".join(table for table in tables if table) + "\n"


def parts_measured(results: dict[str, Any]) -> str:
    """Which part is of which commit."""
    parts: dict[str, list[str]] = {}
    for told in results["programs"]:
        modified = " and uncommitted changes" * told["modified"]
        parts.setdefault(f"commit {told['commit']}{modified} ({told['date']})", []).append(told["part"])
    named = [f"{', '.join(dict.fromkeys(of_it))}: {commit}" for commit, of_it in parts.items()]
    return "; ".join(named)


def copy_rate(figures: Figures) -> float | None:
    """Bytes a second, read and written."""
    copies = of_kind(figures, "copy")
    return copies[0]["bytes"] / median(copies[0]["seconds"]) if copies else None


def of_kind(figures: Figures, kind: str) -> list[Record]:
    """Records of one of the things measured."""
    return [record for record in figures.records if record["kind"] == kind]


def by_format(records: list[Record], *keys: str) -> dict[tuple, dict[str, Record]]:
    """Records of equal `keys`, by their format."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), {})[record["format"]] = record
    return found


def seconds(record: Record | None) -> float | None:
    """Of one step."""
    return median(record["seconds"]) / record["steps"] if record else None


def steps(figures: Figures) -> str:
    """Experts of decode steps."""
    copied, lines = copy_rate(figures), []
    for (case, tokens), each in by_format(of_kind(figures, "decode"), "case", "tokens").items():
        cells = [case, str(tokens)]
        for record in map(each.get, FORMATS):
            took = seconds(record)
            rate = record["bytes"] / record["steps"] / took if record and took else None
            cells += [f"{1e6 * took:.0f}" if took else "–", tera(rate), part(rate, copied)]
        lines.append(row([*cells, ratio(*(seconds(each.get(format)) for format in FORMATS))]))
    if not lines:
        return ""
    names = [f"{format}: {what}" for format in FORMATS for what in ("µs", "TB/s", "of a copy")]
    head = [row(["layer", "tokens", *names, "bfloat16 / int8"]), row(["---"] * 9)]
    told = "Dispatch and experts of a step; TB/s of the matrices of the experts that tokens go to."
    return "\n".join(["## Experts of a decode step", "", told, "", *head, *lines])


def prompts(figures: Figures) -> str:
    """Experts over a prompt."""
    lines = []
    for (case, tokens), each in by_format(of_kind(figures, "prefill"), "case", "tokens").items():
        plain, rounded = (each.get(format) for format in ("bfloat16", "int8-dynamic"))
        rates = [
            record["flops"] / median(record["seconds"]) if record else None for record in (plain, rounded)
        ]
        lines.append(row([case, str(tokens), *map(tera, rates), ratio(seconds(plain), seconds(rounded))]))
    if not lines:
        return ""
    head = [row(["layer", "tokens", "bfloat16, TF/s", "W8A8, TOP/s", "bfloat16 / W8A8"]), row(["---"] * 5)]
    return "\n".join(["## Experts over a prompt", "", *head, *lines])


def models(figures: Figures) -> str:
    """A whole model, ours and the peer's."""
    records = of_kind(figures, "model")
    if not records:
        return ""
    lines = [row(["batch", "weights", "library", "prompt tokens/s", "new tokens/s"]), row(["---"] * 5)]
    for record in sorted(records, key=lambda r: r["batch"]):
        speeds = (f"{record[name]:,.0f}" for name in ("prefill", "decode"))
        lines.append(row([str(record["batch"]), record["format"], record["program"], *speeds]))
    return "\n".join(["## OLMoE-1B-7B, random weights", "", *lines])


def requests(figures: Figures) -> str:
    """One request at a time."""
    records = [record for record in of_kind(figures, "request") if record["program"] == OURS]
    if not records:
        return ""
    lines = [row(["weights", "median, ms", "99th percentile, ms", "requests"]), row(["---"] * 4)]
    for record in records:
        taken = record["milliseconds"]
        worst = quantiles(taken, n=100, method="inclusive")[-1]
        lines.append(row([record["format"], f"{median(taken):.1f}", f"{worst:.1f}", str(len(taken))]))
    told = "OLMoE-1B-7B (1.3 B active): a prompt of 512 tokens, 32 new ones, one request at a time."
    return "\n".join(["## One request", "", told, "", *lines])
