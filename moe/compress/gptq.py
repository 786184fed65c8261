"""Rounding that knows what enters a matrix: each input's error is made up for by the inputs still to come."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.quant import Format, find_scales, round_to

DAMPING = 0.01  # of the mean second moment, added to each: GPTQ's, so that the inverse exists
CLIPS = tuple(
    1.0 - 0.05 * i for i in range(9)
)  # shares of a group's largest weight that are tried as its largest code


def gptq(
    w: Float[Array, "*n D F"], moment: Float[Array, "*n D D"], format: Format
) -> tuple[Int[Array, "*n D F"], Float[Array, "*n G F"]]:
    """Codes and scales that keep x @ w for inputs of these second moments (GPTQ, 2210.17323, algorithm 1).

    Scales are found first, those of least squared error weighted by each input's own second moment. Matrices
    are taken one layer at a time, all experts of a layer together.
    """
    if w.ndim > 3:
        return jax.lax.map(lambda pair: gptq(pair[0], pair[1], format), (w, moment))
    if w.ndim == 3:
        return jax.vmap(partial(gptq, format=format))(w, moment)
    w = w.astype(jnp.float32)
    scales = best_scales(w, jnp.diagonal(moment), format)
    return _round_in_turn(w, _upper(moment), scales, format), scales


def best_scales(w: Float[Array, "D F"], importance: Float[Array, "D"], format: Format) -> Float[Array, "G F"]:
    """For each group, the scale of least squared error among those that clip its largest weights a little."""
    groups = format.groups(w.shape[0])

    def error(clip):
        scales = find_scales(w, format, jnp.full((groups, w.shape[1]), clip))
        wide = jnp.repeat(scales.astype(jnp.float32), w.shape[0] // groups, axis=0)
        off = round_to(w, scales, format).astype(jnp.float32) * wide - w
        # An input that was always zero has no importance of its own, yet is not left out.
        weighted = off**2 * (importance + 1e-6 * importance.mean() + 1e-30)[:, None]
        return weighted.reshape(groups, -1, w.shape[1]).sum(1)

    clips = jnp.array(CLIPS)
    return find_scales(w, format, clips[jnp.argmin(jax.vmap(error)(clips), axis=0)])


def _upper(moment: Float[Array, "D D"]) -> Float[Array, "D D"]:
    """U with U^T U the inverse of the damped moments: row d says how later inputs make up for input d."""
    diagonal = jnp.diagonal(moment)
    damped = moment + jnp.diag(jnp.maximum(DAMPING * diagonal.mean(), 1e-30) * jnp.ones_like(diagonal))
    # Without any inputs this is the identity but for a factor, and rounding is to the nearest.
    damped = damped / jnp.diagonal(damped).mean()
    return jnp.linalg.cholesky(jnp.linalg.inv(damped)).T


def _round_in_turn(w, upper, scales, format: Format) -> Int[Array, "D F"]:
    size = w.shape[0] // scales.shape[0]

    def one(d, carry):
        w, codes = carry
        scale = scales[d // size].astype(jnp.float32)
        code = round_to(w[d][None], scales[d // size][None], format)[0]
        error = (w[d] - code.astype(jnp.float32) * scale) / upper[d, d]
        later = jnp.where(jnp.arange(w.shape[0]) > d, upper[d], 0.0)
        return w - later[:, None] * error, codes.at[d].set(code)

    return jax.lax.fori_loop(0, w.shape[0], one, (w, jnp.zeros(w.shape, format.dtype)))[1]
