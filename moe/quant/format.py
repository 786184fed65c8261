"""What a quantised number looks like."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from moe.errors import UserError

LARGEST = {"int8": 127, "int4": 7, "fp8": 448}  # magnitude that a code can hold; e4m3's for fp8
BITS = {"int8": 8, "int4": 4, "fp8": 8}


@dataclass(frozen=True)
class Format:
    """Symmetric numbers: weight = code * scale, with a scale for each output channel of each matrix.

    Every expert has scales of its own: one that is shared over experts spends most of the codes of a small
    expert (a rare one, under weight decay) on the range of the largest.
    """

    codes: Literal["int8", "int4", "fp8"] = "int8"
    """int8 in [-127, 127]; int4 in [-7, 7], two in a byte; fp8 e4m3 (2209.05433) in [-448, 448]."""

    group_size: int = 0
    """Neighbouring inputs that share a scale; 0: all inputs of an output channel."""

    dynamic: bool = False
    """Round activations too, to the same codes with one scale a token, found while running (W8A8)."""

    def __post_init__(self):
        if self.group_size < 0:
            raise UserError(f"group_size={self.group_size} must not be negative")
        if self.dynamic and (self.group_size or self.codes == "int4"):
            raise UserError("dynamic=True needs codes of eight bits and group_size=0")

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.codes]

    @property
    def largest(self) -> int:
        """Magnitude that a code can hold."""
        return LARGEST[self.codes]

    @property
    def dtype(self) -> jnp.dtype:
        """Of a code on its own; packing puts two of int4 in a byte."""
        return jnp.dtype("float8_e4m3fn" if self.codes == "fp8" else "int8")

    @property
    def scale_dtype(self) -> jnp.dtype:
        """Of the scales: groups have many of them, so in bfloat16, which has the range of float32."""
        return jnp.dtype("bfloat16" if self.group_size else "float32")

    def groups(self, inputs: int) -> int:
        """Scales of an output channel with so many inputs.

        Raises:
            UserError: the inputs do not make whole groups, or no pairs of int4.
        """
        if self.group_size and inputs % self.group_size:
            raise UserError(
                f"group_size={self.group_size} does not divide the {inputs} inputs of a matrix; "
                "choose a divisor"
            )
        if self.codes == "int4" and inputs % 2:
            raise UserError(f"int4 goes in pairs, a matrix has {inputs} inputs; keep it in int8")
        return inputs // self.group_size if self.group_size else 1


FORMATS = {
    "int8": Format("int8"),
    "int8-dynamic": Format("int8", dynamic=True),
    "int4": Format("int4", group_size=32),
    "fp8": Format("fp8", dynamic=True),
}
"""The formats that go by a name on command lines and in configs."""


def format_named(name: str) -> Format:
    """A format by its name; a number behind int8 or int4 is the group size, as in int4-128.

    Raises:
        UserError: there is no such format.
    """
    codes, _, size = name.partition("-")
    if name in FORMATS:
        return FORMATS[name]
    if codes in ("int8", "int4") and size.isdecimal():
        return Format(codes, int(size))
    raise UserError(f"{name!r} is no format; say {', '.join(FORMATS)}, or with a group size, like int4-128")
