"""The page of `benchmarks/expert_parallel.py`."""

from statistics import median
from typing import Any

from benchmarks.gpu.cells import gibi, part, row
from benchmarks.gpu.expert_parallel_jax import ALONE

LAYER = ("forward", "forward + backward")


def page(results: dict[str, Any]) -> str:
    """All tables; the short one last."""
    records = [record for record in results["records"] if "failed" not in record]
    shapes = list(dict.fromkeys(record["case"] for record in records))
    card = ", ".join(f"{name} {value}" for name, value in results["gpu"].items()) or "no GPU: a trial"
    sections = [
        f"""# Expert parallelism over {results["devices"]} devices

Made by `uv run benchmarks/expert_parallel.py`, whose docstring says what is measured and how.

- {results["date"]}, commit {results["commit"]}{" and uncommitted changes" if results["modified"] else ""}; \
python {results["python"]}, jax {results["versions"]["jax"]}
- {results["devices"]} x {results["device"]}; {card}; {results["hardware"]["processor"]}
- Medians over {results["rounds"]} rounds of at least 20 calls each""",
        *(_layer(records, shape) for shape in shapes),
        _summary(records, shapes),
        *_failures(results),
    ]
    return "\n\n".join(sections) + "\n"


def _layer(records: list[dict[str, Any]], shape: str) -> str:
    lines = [
        f"## MoE layer: {shape}",
        "",
        "Of alone: the time of the same work on one device without communication over this time.",
        "",
        row(
            ["exchange", "chunks", "forward, ms", "of alone", "with backward, ms", "of alone", "memory, GiB"]
        ),
        row(["---"] * 7),
    ]
    methods = dict.fromkeys((r["exchange"], r["chunks"]) for r in records if r["case"] == shape)
    for exchange, chunks in methods:
        cells = [exchange.removesuffix("()"), str(chunks)]
        for name in LAYER:
            seconds = _seconds(records, shape, exchange, chunks, name)
            cells += [_ms(seconds), part(_seconds(records, shape, ALONE, 1, name), seconds)]
        found = _find(records, shape, exchange, chunks, LAYER[1])
        lines.append(row([*cells, gibi(_bytes(found))]))
    return "\n".join(lines)


def _summary(records: list[dict[str, Any]], shapes: list[str]) -> str:
    lines = [
        "## Train step, and the fastest layer",
        "",
        row(["shape", "pass", "exchange", "chunks", "ms", "alone, ms", "of alone", "memory, GiB"]),
        row(["---"] * 8),
    ]
    for shape in shapes:
        for name in (*LAYER, "train step"):
            mine = [r for r in records if (r["case"], r["pass"]) == (shape, name) and r["exchange"] != ALONE]
            if not mine:
                continue
            best = min(mine, key=lambda record: median(record["seconds"]))
            seconds, alone = median(best["seconds"]), _seconds(records, shape, ALONE, 1, name)
            method = [best["exchange"].removesuffix("()"), str(best["chunks"])]
            times = [_ms(seconds), _ms(alone), part(alone, seconds), gibi(_bytes(best))]
            lines.append(row([shape, name, *method, *times]))
    return "\n".join(lines)


def _failures(results: dict[str, Any]) -> list[str]:
    failed = [record for record in results["records"] if "failed" in record]
    told = [f"- {r['case']}, {r['exchange']}, {r['chunks']} chunks: {r['failed']}" for r in failed]
    return ["\n".join(["## Not measured", "", *told])] if told else []


def _find(records, shape: str, exchange: str, chunks: int, name: str) -> dict[str, Any] | None:
    wanted = (shape, exchange, chunks, name)
    return next((r for r in records if (r["case"], r["exchange"], r["chunks"], r["pass"]) == wanted), None)


def _seconds(records, shape: str, exchange: str, chunks: int, name: str) -> float | None:
    found = _find(records, shape, exchange, chunks, name)
    return median(found["seconds"]) if found else None


def _bytes(record: dict[str, Any] | None) -> int | None:
    return record["argument_bytes"] + record["working_bytes"] if record else None


def _ms(seconds: float | None) -> str:
    return f"{seconds * 1e3:.2f}" if seconds else "–"
