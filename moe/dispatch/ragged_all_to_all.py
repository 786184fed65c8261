"""Exchange by ragged all-to-all: of each buffer only what is taken travels."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.all_to_all import AllToAll
from moe.kernels.device import present_device
from moe.mesh import axis_index


def sends_exact_counts(device) -> bool:
    """Whether `ragged_all_to_all` is good on such devices, however many (libtpu of jax 0.11.2)."""
    return device.platform == "tpu" and device.device_kind not in ("TPU v5 lite", "TPU v5e")


@dataclass(frozen=True)
class RaggedAllToAll(AllToAll):
    """`AllToAll` that sends no empty places, by XLA's `ragged_all_to_all`.

    For TPUs, but of v5e's only a few: their compiler refuses it for a slice of 16 x 16. On GPUs that
    operation is slow (3 GB/s between two H200s, where `all_to_all` makes 219); CPUs have none, and send whole
    buffers.
    """

    def swap(
        self, rows: Float[Array, "R ..."], sent: Int[Array, "devices"], received: Int[Array, "devices"]
    ) -> Float[Array, "R ..."]:
        """See `AllToAll`."""
        if present_device().platform == "cpu":
            return super().swap(rows, sent, received)
        devices, places = len(sent), len(rows) // len(sent)
        parts = jnp.arange(devices, dtype=jnp.int32) * places
        own = jnp.full_like(sent, 0) + axis_index("expert") * places
        return jax.lax.ragged_all_to_all(
            rows, jnp.zeros_like(rows), parts, sent, own, received, axis_name="expert"
        )
