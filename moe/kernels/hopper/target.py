"""Whether the kernels of this folder apply."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe.kernels.device import present_device
from moe.kernels.groups import Groups
from moe.kernels.hopper.pipeline import ROWS

CHIPS = ("H100", "H200", "GH200", "H800", "H20")
WIDTH = 128  # in whole numbers of which matrices are cut


def present() -> bool:
    """Whether what is traced now will run on a Hopper GPU."""
    return present_chip() is not None


def present_chip() -> str | None:
    """The Hopper chip that what is traced now will run on."""
    return next((chip for chip in CHIPS if chip in present_device().device_kind.split()), None)


def fits(groups: Groups, *operands: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernels take these: numbers of one two-byte type, in widths and tiles that they can cut.

    Args:
        groups: layout of the rows.
        operands: rows [R, width] and matrices [E, width, width].
    """
    return (
        present()
        and {jnp.dtype(x.dtype).name for x in operands} in ({"bfloat16"}, {"float16"})
        and all(width % WIDTH == 0 for x in operands for width in x.shape[1:])
        and groups.tile % ROWS == 0
        and not groups.uniform
    )
