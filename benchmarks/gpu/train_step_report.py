"""Results of `train_step.py` as Markdown."""

from statistics import median
from typing import Any

SHOWN = 25  # kernels on the page


def page(results: dict[str, Any]) -> str:
    """The page `docs/results/train_step_GPU.md`."""
    sections = ["# A whole train step on a GPU", _head(results), _figures(results)]
    match results["profile"]:
        case None:
            pass
        case {"failed": reason}:
            sections.append(f"No profile: {reason}")
        case profile:
            sections += [_parts(profile), _kernels(profile)]
    return "\n\n".join(sections) + "\n"


def mfu(results: dict[str, Any]) -> float | None:
    """Share of the devices' peak that the model's own operations take; None where the peak is not known."""
    if not results["peak"]:
        return None
    return _rate(results) / (results["peak"] * results["devices_used"])


def _rate(results: dict[str, Any]) -> float:
    """The model's own operations a second."""
    return results["flops_of_a_token"] * results["tokens_of_a_step"] / median(results["seconds"])


def _head(results: dict[str, Any]) -> str:
    shape, hardware = results["shape"], results["gpu"]
    versions = {"python": results["python"]} | results["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    card = ", ".join(f"{name} {value}" for name, value in hardware.items()) or "no GPU: a trial"
    modified = " and uncommitted changes" if results["modified"] else ""
    changed = f" with {' '.join(results['overrides'])}" if results["overrides"] else ""
    return f"""Made by `uv run benchmarks/train_step.py`, whose docstring says what is measured and how.

- {results["date"]}, commit {results["commit"]}{modified}; {named}
- {card}; {results["hardware"]["processor"]}
- `{results["config"]}`{changed}: layers {shape["layers"]} of width {shape["width"]},
  {shape["num_experts"]} experts of width {shape["expert_width"]}, {shape["experts_per_token"]:g} a token,
  vocabulary {shape["vocab_size"]}; {results["parameters"]:,} parameters,
  {results["active_parameters"]:,.0f} active
- {shape["sequences"]} sequences of {shape["sequence_length"]} tokens, accumulation {shape["accumulation"]},
  {shape["compute_dtype"]}, remat {shape["remat"]}, unroll {shape["unroll"]},
  {shape["loss_chunks"]} loss chunks; {shape["optimizer"]}"""


def _figures(results: dict[str, Any]) -> str:
    seconds, share = results["seconds"], mfu(results)
    step, tokens = median(seconds), results["tokens_of_a_step"]
    memory = "not told" if results["peak_bytes"] is None else f"{results['peak_bytes'] / 2**30:.1f} GiB"
    reached = "peak not known" if share is None else f"{share:.1%} of {results['peak'] / 1e12:.0f} TF/s"
    return f"""| | |
|---|---|
| step, median of {len(seconds)} | {1e3 * step:.1f} ms ({1e3 * min(seconds):.1f}–{1e3 * max(seconds):.1f}) |
| tokens/s | {tokens / step:,.0f} |
| operations of the model | {_rate(results) / 1e12:.1f} TF/s |
| MFU | {reached} |
| most memory held | {memory} |
| compilation | {results["compile_seconds"]:.0f} s |"""


def _parts(profile: dict[str, Any]) -> str:
    busy, idle = profile["busy"], profile["idle"]
    lines = [
        f"| {part} | {1e3 * seconds:.2f} | {seconds / busy:.1%} |"
        for part, seconds in profile["parts"].items()
    ]
    gaps = (
        f"In the step as it is, no kernel runs for {1e3 * idle:.2f} ms, {idle / profile['span']:.1%} of it."
    )
    return "\n".join(["| kernels of | ms | share |", "|---|---|---|", *lines, "", gaps])


def _kernels(profile: dict[str, Any]) -> str:
    lines = ["| kernel | instruction | part | calls | ms | share |", "|---|---|---|---|---|---|"]
    for kernel in profile["kernels"][:SHOWN]:
        share = kernel["seconds"] / profile["busy"]
        names = f"`{_short(kernel['name'])}` | {kernel['instruction']} | {kernel['part']}"
        lines.append(f"| {names} | {kernel['calls']:g} | {1e3 * kernel['seconds']:.2f} | {share:.1%} |")
    return "\n".join([f"The {SHOWN} costliest kernels of a step:", "", *lines])


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
