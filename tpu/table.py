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
BEGIN, END = "<!-- predictions -->", "<!-- end of predictions -->"

HEAD = (
    "| model | topology | mesh | tokens a device | GiB of a device | FLOPs, compiled over expected "
    "| GB sent by a device | bound by | predicted MFU | tokens/s a chip |\n" + 10 * "|---" + "|"
)


def main() -> None:
    """Render."""
    kept = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    kept = [k for k in kept if "mfu_roofline" in k]
    kept.sort(key=lambda k: (k["config"], list(CHIPS).index(k["topology"].partition(":")[0])))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([HEAD, *map(row, kept)])
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def row(k: dict[str, Any]) -> str:
    """One prediction."""
    devices = math.prod(k["mesh"].values())
    chips = devices / CHIPS[k["topology"].partition(":")[0]].devices
    times = k["times"]
    cells = (
        k["config"],
        k["topology"],
        layout(k["mesh"]),
        f"{k['tokens'] / devices:,.0f}",
        f"{sum(k['memory'].values()) / GIB:.1f} of {k['hbm'] / GIB:.0f}"
        + ("" if k["fits"] else ": too much"),
        f"{k['compiled_over_expected'] - 1:+.1%}",
        f"{sum(sent['bytes'] for sent in k['collectives']) / 1e9:.1f}",
        k["bound"],
        f"{k['mfu_compiler']:.0%} to {k['mfu_roofline']:.0%}",
        f"{k['tokens'] / times['compiler'] / chips:,.0f} to {k['tokens'] / times['roofline'] / chips:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
