"""Fake quantisation: weights as they would come back from quantised ones, with gradients to train them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.quant.format import Format
from moe.quant.matrix import find_scales, round_to


def fake_quantize(
    w: Float[Array, "*n D F"],
    format: Format,
    *,
    clip: Float[Array, "*n G F"] | None = None,
    noise: Float[Array, "*n D F"] | None = None,
) -> Float[Array, "*n D F"]:
    """dequantize(quantize(w)), whose gradient takes rounding for the identity (straight-through, 1308.3432).

    Args:
        w: matrices, inputs along the second axis from behind.
        format: of the codes.
        clip: share of each group's largest weight that takes the largest code, to be learned: weights beyond
            it pass no gradient to themselves but to their scale, which gets LSQ's (1902.08153 eq. 3). None
            takes all of it.
        noise: for stochastic rounding, see `round_to`.
    """
    if clip is not None:
        return _clipped(w, format, clip, noise)
    scales = find_scales(w, format)
    there_and_back = round_to(w, scales, format, noise).astype(jnp.float32) * _widened(scales, w)
    return w + jax.lax.stop_gradient(there_and_back - w)


def _clipped(w, format, clip, noise):
    # LSQ's section 2.2: without this a scale, on which many weights pull, would move faster than they do.
    gentleness = (w.shape[-2] / clip.shape[-2] * format.largest) ** -0.5
    clip = clip * gentleness + jax.lax.stop_gradient(clip * (1 - gentleness))
    scales = find_scales(jax.lax.stop_gradient(w), format, clip)
    # What d(scale * round(w / scale)) is with rounding taken for the identity, inside the range and beyond.
    wide = _widened(scales, w)
    v = jnp.clip(w / wide, -format.largest, format.largest)
    return wide * (v + jax.lax.stop_gradient(round_to(w, scales, format, noise).astype(jnp.float32) - v))


def _widened(scales, w):
    """A scale for each weight."""
    return jnp.repeat(scales.astype(jnp.float32), w.shape[-2] // scales.shape[-2], axis=-2)
