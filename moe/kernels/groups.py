"""How rows lie when they are grouped by expert."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

TILES_AT_ONCE = 4  # tiles whose products the CPU loop makes together, so that every core has some


class TileExperts(NamedTuple):
    """What a kernel that goes through tiles of rows asks for."""

    expert: Int[Array, "tiles"]
    """Of each tile; behind the last group the last expert."""

    used: Int[Array, "1"]
    """Tiles that hold rows."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Rows grouped by expert: expert 0's first, each group starting at a multiple of `tile`.

    A tile of rows therefore belongs to one expert only. Rows that pad a group up to the next tile, and rows
    behind the last group, may hold anything finite; what a kernel writes there is not read.
    """

    group_sizes: Int[Array, "E"]
    """Rows of each expert, padding not counted."""

    tile: int = jax.tree.static()
    """Rows of a tile."""

    uniform: bool = jax.tree.static(default=False)
    """Every expert owns exactly R / E rows, whatever `group_sizes` says of their use (capacity dispatch)."""

    tiles: TileExperts | None = None
    """The experts of the tiles, where they were found together with the rows."""

    def padded_sizes(self) -> Int[Array, "E"]:
        """Rows of each expert, padding counted."""
        return -(-self.group_sizes // self.tile) * self.tile

    def starts(self) -> Int[Array, "E"]:
        """First row of each expert."""
        sizes = self.padded_sizes()
        return jnp.cumsum(sizes) - sizes

    def tile_experts(self, tiles: int) -> Int[Array, "tiles"]:
        """The expert of each tile; tiles behind the last group say the last expert."""
        if self.tiles is not None and self.tiles.expert.shape[0] == tiles:
            return self.tiles.expert
        ends = jnp.cumsum(self.padded_sizes()) // self.tile
        experts = jnp.searchsorted(ends, jnp.arange(tiles), side="right", method="compare_all")
        return jnp.minimum(experts, self.group_sizes.shape[0] - 1)

    def used_tiles(self) -> Int[Array, ""]:
        """Tiles that hold rows."""
        if self.tiles is not None:
            return self.tiles.used[0]
        return self.padded_sizes().sum() // self.tile


def rows_needed(assignments: int, experts: int, tile: int) -> int:
    """Rows that hold any split of `assignments` over `experts` with groups padded to `tile`."""
    worst_padding = min(experts, assignments) * (tile - 1)
    step = tile * TILES_AT_ONCE
    return -(-(assignments + worst_padding) // step) * step
