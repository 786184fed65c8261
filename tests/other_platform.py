"""What a kernel does on another platform, done here: `lax.platform_dependent` takes its branch."""

from unittest import mock

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def traced_as(platform: str):
    """Context for tracing; `platform` as JAX calls it: "cpu", "cuda", "tpu"."""

    def choose(*operands, default=None, **by_platform):
        return by_platform.get(platform, default)(*operands)

    return mock.patch.object(jax.lax, "platform_dependent", choose)


def traced_for(card: str):
    """Context for tracing and lowering as if this GPU were here."""
    device = AbstractDevice(device_kind=card, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
