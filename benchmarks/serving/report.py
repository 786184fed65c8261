"""The results of `serving_cpu.py` as Markdown."""

from statistics import median
from typing import Any

from benchmarks.report import spread


def markdown(results: dict[str, Any]) -> str:
    """The page `docs/results/serving_cpu.md`."""
    hardware, engines = results["hardware"], results["engines"]
    versions = {"python": results["python"]}
    for each in engines:
        versions |= each["versions"]
    modified = " and uncommitted changes" if results["modified"] else ""
    different = min(each["different_tokens"] for each in engines)
    builds = sorted({each["build"] for each in engines if "build" in each})
    lines = [
        "# Serving on a CPU",
        "",
        "Made by `uv run --extra onnx --extra gguf benchmarks/serving_cpu.py`, whose docstring says what is",
        "measured and how. All figures: `benchmarks/results/serving_cpu.json`.",
        "",
        f"- {results['date']}, commit {results['commit']}{modified};",
        f"  {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- {hardware['processor']} ({', '.join(hardware['instructions'])}), {results['threads']} of "
        f"{hardware['cores']} cores; other programs took {results['others_share']:.0%} of them meanwhile",
        *(f"- {build}" for build in builds),
        f"- {results['parameters']:,} parameters, {results['active_parameters']:,} active, random; one "
        f"sequence, a prompt of {results['prompt']} tokens, {results['new']} new ones, at least {different} "
        "of them different",
        "",
        "Tokens a second: median over turns, with the slowest and the fastest turn in brackets. Against the",
        "engine's own unquantised format, turn by turn: the median.",
        "",
        "| engine | format | decode | against | prefill | against | memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    by_name = {(each["engine"], each["format"]): each for each in engines}
    for each in engines:
        cells = [each["engine"], each["format"]]
        for what, tokens in (("decode", results["new"]), ("prefill", results["prompt"])):
            baseline = by_name[each["engine"], each["baseline"]][what]
            ratio = median(b / seconds for b, seconds in zip(baseline, each[what], strict=True))
            cells += [spread([tokens / seconds for seconds in each[what]], 0), f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {each['peak_bytes'] / 2**30:.2f} |")
    return "\n".join(lines) + "\n"
