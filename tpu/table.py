"""Write the predictions kept in docs/results/tpu into the table of docs/tpu.md.

    uv run tpu/table.py

A prediction is what `tpu/compile.py ... --out docs/results/tpu/NAME.json` wrote; each keeps its command.
"""

import json
import math
from pathlib import Path
from typing import Any

from moe.analysis.hardware import GIB
from tpu.chips import CHIPS
from tpu.report import layout

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "tpu.md", ROOT / "docs" / "results" / "tpu"

TRAINING = (
    "| model | topology | mesh | tokens a device | GiB of a device | FLOPs, compiled over expected "
    "| GB sent by a device | bound by | predicted MFU | tokens/s a chip |\n" + 10 * "|---" + "|"
)
GENERATION = (
    "| model | step | topology | mesh | tokens a device | GiB of a device | of them cache | FLOPs, compiled "
    "over expected | GB through HBM | bound by | ms a step | tokens/s a chip |\n" + 12 * "|---" + "|"
)


def main() -> None:
    """Render."""
    kept = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    kept = [k for k in kept if "mfu_roofline" in k]
    kept.sort(key=lambda k: (k["config"], list(CHIPS).index(k["topology"].partition(":")[0])))
    page = PAGE.read_text()
    page = filled(page, "predictions", [TRAINING, *(row(k) for k in kept if k["step"] == "train")])
    page = filled(page, "generation", [GENERATION, *(row(k) for k in kept if k["step"] != "train")])
    PAGE.write_text(page)


def filled(page: str, name: str, lines: list[str]) -> str:
    """A page with these lines between the two marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    return "\n".join([before + begin, *lines, end + rest.partition(end)[2]])


def row(k: dict[str, Any]) -> str:
    """One prediction."""
    devices = math.prod(k["mesh"].values())
    chips = devices / CHIPS[k["topology"].partition(":")[0]].devices
    slow, fast = (k["times"][name] for name in ("compiler", "roofline"))
    place, tokens = [k["topology"], layout(k["mesh"])], f"{k['tokens'] / devices:,.0f}"
    memory = f"{sum(k['memory'].values()) / GIB:.1f} of {k['hbm'] / GIB:.0f}"
    memory += "" if k["fits"] else ": too much"
    flops = f"{k['compiled_over_expected'] - 1:+.1%}"
    rate = f"{k['tokens'] / slow / chips:,.0f} to {k['tokens'] / fast / chips:,.0f}"
    if k["step"] == "train":
        sent = f"{sum(sent['bytes'] for sent in k['collectives']) / 1e9:.1f}"
        mfu = f"{k['mfu_compiler']:.0%} to {k['mfu_roofline']:.0%}"
        cells = [k["config"], *place, tokens, memory, flops, sent, k["bound"], mfu, rate]
    else:
        cache, moved = f"{k['memory']['cache'] / GIB:.1f}", f"{k['bytes'] / 1e9:.1f}"
        times = f"{1e3 * slow:.1f} to {1e3 * fast:.1f}"
        what = [k["config"], k["step"]]
        cells = [*what, *place, tokens, memory, cache, flops, moved, k["bound"], times, rate]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
