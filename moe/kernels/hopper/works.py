"""What a layer calls of the Hopper kernels, each on random data and with tiles to try."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.errors import UserError
from moe.kernels import hopper
from moe.kernels.groups import Groups, rows_needed
from moe.kernels.hopper import Tiles, tiling
from moe.kernels.hopper.pipeline import ROWS
from moe.kernels.hopper.tiling import BY_ROWS, Case

STRIPS = (1, 2, 4, 8, 16)  # of column tiles
BANDS = (4, 8, 16, 32)  # strips of row tiles


@dataclass(frozen=True)
class LayerShape:
    """One layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int

    @staticmethod
    def parse(text: str) -> "LayerShape":
        """From T,D,F,E,K.

        Raises:
            UserError: it is not that.
        """
        parts = text.split(",")
        if len(parts) != 5 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise UserError(
                f"shapes: {text!r} must be five numbers T,D,F,E,K, for example 32768,2048,1024,64,8"
            )
        shape = LayerShape(*map(int, parts))
        if shape.width % 128 or shape.hidden % 128:
            raise UserError(f"shapes: D and F of {text!r} must be multiples of 128")
        return shape


@dataclass(frozen=True)
class Work:
    """A kernel as the layer calls it."""

    case: Case
    flops: int
    run: Callable[[dict[str, Any], Tiles], Any]

    def column_tiles(self, tiles: Tiles) -> int:
        """How many lie side by side, of both matrices where there are two: no strip is wider."""
        match self.case.kernel:
            case "swiglu_product":
                return -(-2 * self.case.width // tiles.columns)
            case "weight_gradient":
                return 2 * -(-self.case.width // tiles.columns)
            case _:
                return -(-self.case.width // tiles.columns)

    def forms(self) -> list[Tiles]:
        """Tiles to try first, the rule's at the head; each with the deepest ring that fits."""
        rule = self.case.rule()
        sides = ((BY_ROWS, 256), (2 * BY_ROWS, 128), (BY_ROWS, 128), (ROWS, 256))
        others = [replace(rule, rows=r, columns=c, stages=tiling.most_stages(r, c)) for r, c in sides]
        return [tiles for tiles in dict.fromkeys([rule, *others]) if self.case.takes(tiles)]

    def orders(self, tiles: Tiles) -> list[Tiles]:
        """The same tiles in every order that differs, its own first."""
        most = self.column_tiles(tiles)
        strips = [replace(tiles, strip=strip) for strip in sorted({min(strip, most) for strip in STRIPS})]
        bands = [replace(tiles, strip=band, along="columns") for band in BANDS]
        return list(dict.fromkeys([tiles, *strips, *bands]))


def works(shape: LayerShape, tile: int) -> list[Work]:
    """All that a step of a layer of this shape calls."""
    d, f = shape.width, shape.hidden
    first = hopper.gathers_first(f)
    of_columns = "weight_gradient" if first else "weight_gradient, gathered columns"
    once = 2 * shape.tokens * shape.per_token * d * f

    def work(kernel, depth, width, products, run):
        return Work(Case(kernel, depth, width, shape.experts, tile), products * once, run)

    def by_row(a):
        return (a["rows"], None) if first else (a["x"], a["token"])

    def swiglu_product(a, tiles):
        x, token = by_row(a)
        return hopper.swiglu_product(x, a["w_gate"], a["w_up"], a["groups"], token=token, tiles=tiles)

    def swiglu_backward(a, tiles):
        y_bar, token = by_row(a)
        inputs = (a["w_down"], a["h"], a["weight"], a["groups"])
        return hopper.swiglu_backward(y_bar, *inputs, token=token, tiles=tiles)

    def inward_transposed(a, tiles):
        return hopper.inward_transposed(a["h"], a["w_gate"], a["w_up"], a["groups"], tiles=tiles)

    def inward_gradient(a, tiles):
        x, token = by_row(a)
        return hopper.weight_gradient(x, a["h"], a["groups"], matrices=2, x_token=token, tiles=tiles)

    def down_gradient(a, tiles):
        y_bar, token = by_row(a)
        return hopper.weight_gradient(a["hidden"], y_bar, a["groups"], y_token=token, tiles=tiles)

    return [
        work("swiglu_product", d, f, 2, swiglu_product),
        work("product", f, d, 1, lambda a, t: hopper.product(a["hidden"], a["w_down"], a["groups"], tiles=t)),
        work("product", d, f, 1, lambda a, t: hopper.product(a["rows"], a["w_up"], a["groups"], tiles=t)),
        work("swiglu_backward", d, f, 1, swiglu_backward),
        work("inward_transposed", 2 * f, d, 2, inward_transposed),
        work("weight_gradient", d, f, 2, inward_gradient),
        work(of_columns, f, d, 1, down_gradient),
    ]


def draw(shape: LayerShape, tile: int) -> dict[str, Any]:
    """Random arrays and an even choice of experts, always the same; rows lie as the dispatch lays them."""
    random, experts, d, f = np.random.default_rng(0), shape.experts, shape.width, shape.hidden
    expert = random.integers(experts, size=shape.tokens * shape.per_token)
    rows = rows_needed(len(expert), experts, tile)
    order, sizes = np.argsort(expert, kind="stable"), np.bincount(expert, minlength=experts)
    padding = -sizes % tile
    row = np.arange(len(expert)) + np.repeat(np.cumsum(padding) - padding, sizes)
    token = np.zeros(rows, np.int32)
    token[row] = order // shape.per_token
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape, std=1.0):
        return std * jax.random.normal(next(keys), shape, jnp.bfloat16)

    return {
        "groups": Groups(jnp.asarray(sizes, jnp.int32), tile),
        "token": jnp.asarray(token),
        "weight": jax.random.uniform(next(keys), (rows,)),
        "x": normal(shape.tokens, d),
        "rows": normal(rows, d),
        "hidden": normal(rows, f),
        "h": normal(rows, 2 * f),
        "w_gate": normal(experts, d, f, std=d**-0.5),
        "w_up": normal(experts, d, f, std=d**-0.5),
        "w_down": normal(experts, f, d, std=f**-0.5),
    }
