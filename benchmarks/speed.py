"""Predicted against measured: a config's train step, prompts and decode steps on the device that is here.

    uv run benchmarks/speed.py configs/olmoe_3b_h100.py --context 1024 --batches 1 8 32 128
    uv run benchmarks/speed.py configs/olmoe_1b_7b.py --skip-train --context 1024 --batches 1 8 32 128
    uv run benchmarks/speed.py configs/olmoe_1b_7b.py --skip-train --context 1024 --quantize int8 --name int8

The same as `eval.py CONFIG --speed`, whose fields follow (docs/eval.md says what is measured and what the
prediction assumes). Results go to `benchmarks/results/speed_NAME_DEVICE.json` and
`docs/results/speed_NAME_DEVICE.md`; `--render FILE` measures nothing and makes the page of kept results. The
commit of a copy of the tree that has no repository can be given as the environment variable COMMIT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.command import gpu
from benchmarks.provenance import provenance
from benchmarks.worker import ROOT
from moe.analysis.cost.table import duration, scaled
from moe.errors import UserError, run_main
from moe.evaluation.speed_command import Speed, speed_report
from moe.evaluation.speed_table import show
from moe.training.prediction import asked_of

NAMES = {"median": "measured", "p90": "p90", "p99": "p99", "predicted": "predicted"}


def main() -> None:
    """Measure, print and keep."""
    if len(sys.argv) < 2:
        raise UserError("give a config first, for example: uv run benchmarks/speed.py configs/quickstart.py")
    path, *arguments = sys.argv[1:]
    if path == "--render":
        kept = Path(arguments[0])
        (ROOT / "docs" / "results" / f"{kept.stem}.md").write_text(page(json.loads(kept.read_text())))
        return
    asked, _ = asked_of(path, arguments, Speed)
    about = provenance() | {"jax": jax.__version__, "gpu": gpu(), "config": path, "arguments": arguments}
    found = about | speed_report(asked, None)
    show(found)
    device = found["device"].lower().replace("nvidia", "").split()[0]
    out = ROOT / "benchmarks" / "results" / f"speed_{asked.name}_{device}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    text = page(found)
    (ROOT / "docs" / "results" / f"{out.stem}.md").write_text(text)
    print(text)


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rates, card = found["rates"], ", ".join(found["gpu"].values()) or found["device"]
    header = ["", *NAMES.values(), "error", "bound by the data sheet", "binds", "MFU", "bandwidth used"]
    lines = [
        f"# Predicted against measured: {found['name']}",
        "",
        f"Made by `uv run benchmarks/speed.py {found['config']} {' '.join(found['arguments'])}`; what is "
        "measured and what the prediction assumes stands in [eval.md](../eval.md).",
        "",
        f"- {found['date']}, commit {found['commit']}{' and uncommitted changes' * found['modified']}; "
        f"jax {found['jax']}; {found['devices']} x {card}",
        f"- weights in {found['weights']}, cache of {found['context']:,} tokens in {found['cache']}, prompts "
        f"of {found['prompt']:,}; seconds of a train step, of a prompt, of a decode step of the whole batch",
        f"- rates reached here: products {scaled(rates['products'])}F/s, attention "
        f"{scaled(rates['attention'])}F/s, copies {scaled(rates['bandwidth'])}B/s, the smallest kernel "
        f"{duration(rates['kernel'])}",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    for w in found["workloads"]:
        cells = [w["name"], *(duration(w[kind]) for kind in NAMES), f"{w['error']:+.1%}"]
        cells += [duration(w["bound_seconds"]), w["bound"], f"{w['mfu']:.1%}"]
        lines.append("| " + " | ".join([*cells, f"{w['bandwidth_utilisation']:.1%}"]) + " |")
    for w in found["workloads"]:
        if w["profile"] and "failed" not in w["profile"]:
            lines += ["", *_profile(w)]
    return "\n".join(lines) + "\n"


def _profile(workload: dict[str, Any]) -> list[str]:
    profile, predicted = workload["profile"], workload["predicted_by_part"]
    kinds = ", ".join(f"{kind} {s / profile['busy']:.0%}" for kind, s in profile["kinds"].items())
    parts = ", ".join(f"{part} {duration(s)}" for part, s in profile["parts"].items())
    expected = ", ".join(f"{part} {duration(s)}" for part, s in predicted.items() if s >= 1e-6)
    return [
        f"**{workload['name']}**: {kinds}; nothing runs for {profile['idle'] / profile['span']:.1%}. "
        f"Measured: {parts}. Predicted: {expected}."
    ]


if __name__ == "__main__":
    run_main(main)
