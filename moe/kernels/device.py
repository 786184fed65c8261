"""The device that a program is for, while it is traced: a kernel is chosen by it."""

from typing import Any

import jax


def present_device() -> Any:
    """What the program traced now will run on: a device of the mesh, if one is set, else the first."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
