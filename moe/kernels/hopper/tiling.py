"""How each kernel cuts its work: as measured for the card and shape, else by a rule.

`python -m moe.kernels.tune` measures and writes `tables/`, one file a chip.
"""

import json
import math
import sys
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path

from moe.kernels.groups import Groups
from moe.kernels.hopper.pipeline import CHUNK, DEPTH, MULTIPLIERS, ROWS, SHARED_MEMORY, Tiles
from moe.kernels.hopper.target import present_chip

TABLES = Path(__file__).parent / "tables"
BY_ROWS = MULTIPLIERS * ROWS  # rows of a tile that the multipliers share by rows
MOST_SUMS = BY_ROWS * 256  # of an output tile: 128 registers in each thread of the multipliers
NEAR = 2.0  # octaves that a measured shape may be away in all


@dataclass(frozen=True)
class Case:
    """What a kernel is measured for."""

    kernel: str
    """Its function's name."""

    depth: int
    """Length of the contraction; of `weight_gradient` the rows of its result."""

    width: int
    """Columns of its result."""

    experts: int
    """How many matrices."""

    tile: int
    """Rows in which groups are padded."""

    def distance(self, other: "Case") -> float:
        """Octaves between the shapes; depth and width count whole, the number of experts a quarter."""
        pairs = (
            (self.depth, other.depth, 1),
            (self.width, other.width, 1),
            (self.experts, other.experts, 0.25),
        )
        return sum(weight * abs(math.log2(a / b)) for a, b, weight in pairs)

    def takes(self, tiles: Tiles) -> bool:
        """Whether the kernel can cut its work so."""
        rows, columns = tiles.rows, tiles.columns
        if shared_memory(tiles) > SHARED_MEMORY or rows * columns > MOST_SUMS or tiles.stages < 2:
            return False
        match self.kernel:
            case "weight_gradient" | "weight_gradient, gathered columns":
                return rows in (BY_ROWS, 2 * BY_ROWS) and columns in (64, 128, 256)
            case "swiglu_product":  # each multiplier holds whole pieces of both products
                pieces = columns // 2 if rows == BY_ROWS else columns // 4
                return self._rows_fit(rows) and pieces % CHUNK == 0 and self.width % (columns // 2) == 0
            case "swiglu_backward":  # a stage's second operand lends its room to as many rows
                return self._rows_fit(rows) and columns >= BY_ROWS and self.width % columns == 0
            case _:
                mine = columns if rows >= BY_ROWS else columns // MULTIPLIERS
                return self._rows_fit(rows) and mine % CHUNK == 0

    def _rows_fit(self, rows: int) -> bool:
        return rows in (ROWS, BY_ROWS) and self.tile % rows == 0

    def rule(self) -> Tiles:
        """Sound tiles for any shape."""
        rows = BY_ROWS if self.tile % BY_ROWS == 0 else ROWS
        match self.kernel:
            case "swiglu_product":
                return Tiles(rows, columns=256)
            case "swiglu_backward":
                return Tiles(rows, columns=256 if self.width % 256 == 0 else 128)
            case "weight_gradient":
                return Tiles(BY_ROWS, columns=256 if self.width > 128 else 128)
            case "weight_gradient, gathered columns":  # half as many pieces that the loader copies itself
                return Tiles(2 * BY_ROWS, columns=128, strip=8)
            case _:
                return Tiles(rows, columns=256 if self.width > 128 else 128)


@dataclass(frozen=True)
class Measured:
    """The best tiles of a case."""

    case: Case
    tiles: Tiles
    ms: float
    """Milliseconds of the kernel."""

    rule_ms: float
    """The same with the tiles of the rule."""


def tiles_for(kernel: str, groups: Groups, depth: int, width: int) -> Tiles:
    """Tiles of a kernel: the best of the nearest shape that was measured on this chip, else the rule's.

    Args:
        kernel: its function's name.
        groups: layout of the rows.
        depth: length of the contraction; for `weight_gradient` the rows of its result.
        width: columns of its result.
    """
    case = Case(kernel, depth, width, groups.group_sizes.shape[0], groups.tile)
    chip = present_chip()
    table = read(chip) if chip else ()
    if chip and not table:
        _hint(chip)
    alike = [m for m in table if (m.case.kernel, m.case.tile) == (kernel, case.tile) and case.takes(m.tiles)]
    nearest = min(alike, key=lambda m: case.distance(m.case), default=None)
    return nearest.tiles if nearest and case.distance(nearest.case) <= NEAR else case.rule()


def shared_memory(tiles: Tiles) -> int:
    """Bytes that a kernel takes: its ring of operands with two barriers a stage, and pieces of output."""
    stage = 2 * DEPTH * (tiles.rows + tiles.columns) + 2 * 8
    return tiles.stages * stage + 2 * MULTIPLIERS * 2 * ROWS * CHUNK


def most_stages(rows: int, columns: int) -> int:
    """That fit into shared memory."""
    return max(n for n in range(1, 64) if shared_memory(Tiles(rows, columns, stages=n)) <= SHARED_MEMORY)


def table_file(chip: str) -> Path:
    """Where the table of a chip lies."""
    return TABLES / f"{chip.lower()}.json"


@cache
def read(chip: str) -> tuple[Measured, ...]:
    """The table of a chip; empty where there is none."""
    file = table_file(chip)
    return tuple(from_json(file.read_text())) if file.exists() else ()


def from_json(text: str) -> list[Measured]:
    """Undo `to_json`."""
    lines = json.loads(text)["best"]
    return [
        Measured(Case(**line["case"]), Tiles(*line["tiles"]), line["ms"], line["rule_ms"]) for line in lines
    ]


def to_json(table: list[Measured], provenance: dict[str, str]) -> str:
    """One line a case; `tiles` are rows, columns, stages, strip."""
    table = sorted(table, key=lambda m: astuple(m.case))
    lines = [
        json.dumps(
            {
                "case": asdict(m.case),
                "tiles": astuple(m.tiles),
                "ms": round(m.ms, 4),
                "rule_ms": round(m.rule_ms, 4),
            }
        )
        for m in table
    ]
    head = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in provenance.items()]
    return "\n".join(["{", *head, '"best": [', ",\n".join(lines), "]", "}", ""])


@cache
def _hint(chip: str) -> None:
    """Once."""
    print(
        f"note: no tiles were measured on the {chip}, so the experts' kernels take a rule's; "
        "`python -m moe.kernels.tune` finds the best in a few minutes",
        file=sys.stderr,
    )
