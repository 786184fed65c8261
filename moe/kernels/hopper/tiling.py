"""How each kernel cuts its work: as measured for the card and shape, else by a rule."""

from moe.kernels.groups import Groups
from moe.kernels.hopper.pipeline import MULTIPLIERS, ROWS, Tiles


def tiles_for(kernel: str, groups: Groups, depth: int, width: int) -> Tiles:
    """Tiles of a kernel.

    Args:
        kernel: its function's name.
        groups: layout of the rows.
        depth: length of the contraction; for `weight_gradient` the rows of its result.
        width: columns of its result.
    """
    shared_by_rows = MULTIPLIERS * ROWS
    rows = shared_by_rows if groups.tile % shared_by_rows == 0 else ROWS
    match kernel:
        case "swiglu_product":
            return Tiles(rows, columns=256)
        case "swiglu_backward":
            return Tiles(rows, columns=256 if width % 256 == 0 else 128)
        case "weight_gradient":
            return Tiles(shared_by_rows, columns=256 if width > 128 else 128)
        case "weight_gradient, gathered columns":  # half as many of the pieces that the loader copies itself
            return Tiles(2 * shared_by_rows, columns=128, strip=8)
        case _:
            return Tiles(rows, columns=256 if width > 128 else 128)
