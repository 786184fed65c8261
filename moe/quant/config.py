"""Quantisation of a run: what it trains for, and what its checkpoints hold."""

from dataclasses import dataclass
from typing import Literal

from moe.errors import UserError
from moe.quant.format import Format, format_named


@dataclass(frozen=True)
class Quantization:
    """Whether a run trains for quantised weights, and whether it holds any."""

    train: str = ""
    """Format that the run trains for: int8, int4 or fp8, with a group size int4-128. Forward passes see fake
    quantised matrices, evaluations really quantised ones. Empty trains plainly."""

    begin: int = 0
    """Steps of plain training before."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How training rounds; evaluation always takes the nearest code."""

    weights: str = ""
    """Format of the matrices in this run's checkpoints, as `moe.compress.calibrate` writes them; such a run
    is evaluated and served, not trained."""

    def __post_init__(self):
        for name in (self.train, self.weights):
            if name:
                format_named(name)
        if self.train and self.format.dynamic and self.format.codes == "int8":
            raise UserError(f"quantization.train={self.train}: training rounds weights only; say int8")
        if self.begin < 0:
            raise UserError(f"quantization.begin={self.begin} must not be negative")
        if self.rounding == "stochastic" and self.train and self.format.codes == "fp8":
            raise UserError(
                "quantization.rounding=stochastic is for int8 and int4; fp8 rounds to the nearest"
            )

    @property
    def format(self) -> Format:
        """What `train` names."""
        return format_named(self.train)
