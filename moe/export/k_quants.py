"""llama.cpp's K-quants: super-blocks of 256 numbers, in blocks whose scales are quantised themselves.

    Q4_K, Q5_K   8 blocks of 32:   x = d s q - d_min m      q of 4 or 5 bits, s and m of 6
    Q6_K         16 blocks of 16:  x = d s q                q of 6 bits with a sign, s of 8

d and d_min are float16. Layout as `ggml-common.h` and the `gguf` package's dequantisation have it. Scales are
found as llama.cpp does: among a few guesses that differ by a tenth of a code, the one under which the best
scale (and minimum) in the sense of weighted least squares errs least.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Kind
from jaxtyping import Array, Float, UInt8

SUPER_BLOCK = 256
AT_ONCE = 1024  # super-blocks, so that little memory is used and one program serves every tensor
GUESSES = 21  # of a scale
SMALLEST = float(jnp.finfo(jnp.float32).tiny)


def encode(x: Float[np.ndarray, "... n"], kind: Kind) -> UInt8[np.ndarray, "... b"]:
    """Rows of numbers, each of whole super-blocks, as bytes.

    Args:
        x: the numbers.
        kind: Q4_K, Q5_K or Q6_K.
    """
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, SUPER_BLOCK)
    found = []
    for first in range(0, len(blocks), AT_ONCE):
        part = blocks[first : first + AT_ONCE]
        whole = np.pad(part, ((0, AT_ONCE - len(part)), (0, 0)))
        found.append(np.asarray(ENCODERS[kind](whole))[: len(part)])
    return np.concatenate(found).reshape(*x.shape[:-1], -1)


@jax.jit
def _q4_k(x: Float[Array, "n 256"]) -> UInt8[Array, "n 144"]:
    head, q = _affine(x, 15)
    return jnp.concatenate([head, _nibbles(q, 32)], axis=1)


@jax.jit
def _q5_k(x: Float[Array, "n 256"]) -> UInt8[Array, "n 176"]:
    head, q = _affine(x, 31)
    fifth = (q >> 4).reshape(-1, 8, 32)
    high = (fifth << jnp.arange(8, dtype=jnp.uint8)[:, None]).sum(axis=1, dtype=jnp.uint8)
    return jnp.concatenate([head, high, _nibbles(q & 15, 32)], axis=1)


@jax.jit
def _q6_k(x: Float[Array, "n 256"]) -> UInt8[Array, "n 210"]:
    blocks = x.reshape(-1, 16, 16)
    scale = _symmetric_scales(blocks)
    largest = jnp.take_along_axis(scale, jnp.abs(scale).argmax(1, keepdims=True), axis=1)
    d = (largest / -128).astype(jnp.float16)
    codes = jnp.clip(jnp.round(_ratio(scale, d.astype(jnp.float32))), -128, 127).astype(jnp.int8)
    step = d.astype(jnp.float32) * codes
    q = jnp.clip(jnp.round(_ratio(blocks, step[..., None])), -32, 31) + 32
    q = q.astype(jnp.uint8).reshape(-1, SUPER_BLOCK)
    two = (q >> 4).reshape(-1, 2, 4, 32) << (2 * jnp.arange(4, dtype=jnp.uint8)[:, None])
    high = two.sum(axis=2, dtype=jnp.uint8).reshape(-1, 64)
    return jnp.concatenate([_nibbles(q & 15, 64), high, _bytes(codes), _bytes(d)], axis=1)


ENCODERS: dict[Kind, Callable] = {Kind.Q4_K: _q4_k, Kind.Q5_K: _q5_k, Kind.Q6_K: _q6_k}


def _affine(x: Float[Array, "n 256"], most: int) -> tuple[UInt8[Array, "n 16"], UInt8[Array, "n 256"]]:
    """Both scales of each super-block with those of its blocks, as bytes; codes from 0 to `most`."""
    blocks = x.reshape(-1, 8, 32)
    scale, minimum = _affine_scales(blocks, most)
    d, d_min = (a.max(1, keepdims=True).astype(jnp.float32) / 63 for a in (scale, minimum))
    d, d_min = d.astype(jnp.float16), d_min.astype(jnp.float16)
    s, m = (
        jnp.clip(jnp.round(_ratio(a, b.astype(jnp.float32))), 0, 63).astype(jnp.uint8)
        for a, b in ((scale, d), (minimum, d_min))
    )
    step, offset = d.astype(jnp.float32) * s, d_min.astype(jnp.float32) * m
    q = jnp.clip(jnp.round(_ratio(blocks + offset[..., None], step[..., None])), 0, most)
    # Six bits each: the first four of both in the low bits, the last four in four bits and in the high ones.
    packed = [
        (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6),
        (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6),
        (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
    ]
    head = jnp.concatenate([_bytes(d), _bytes(d_min), *packed], axis=1)
    return head, q.astype(jnp.uint8).reshape(-1, SUPER_BLOCK)


def _affine_scales(x: Float[Array, "n b w"], most: int) -> tuple[Float[Array, "n b"], Float[Array, "n b"]]:
    """Scale and minimum of each block, both at least zero: x = scale q - minimum."""
    weight = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) + jnp.abs(x)
    low = jnp.minimum(x.min(-1), 0.0)
    span = x.max(-1) - low

    def error(scale, offset, q):
        return (weight * (scale[..., None] * q + offset[..., None] - x) ** 2).sum(-1)

    def codes(steps):
        return jnp.clip(jnp.round((x - low[..., None]) * _ratio(steps, span)[..., None]), 0, most)

    def guess(number, best):
        q = codes(jnp.broadcast_to(most - 1 + 0.1 * number, span.shape))
        w, wx, wq = weight.sum(-1), (weight * x).sum(-1), (weight * q).sum(-1)
        wqq, wqx = (weight * q * q).sum(-1), (weight * q * x).sum(-1)
        determinant = w * wqq - wq * wq
        scale = _ratio(w * wqx - wx * wq, determinant)
        offset = _ratio(wqq * wx - wq * wqx, determinant)
        above = offset > 0
        scale, offset = jnp.where(above, _ratio(wqx, wqq), scale), jnp.where(above, 0.0, offset)
        found = (jnp.where(determinant > 0, error(scale, offset, q), jnp.inf), scale, offset)
        better = found[0] < best[0]
        return tuple(jnp.where(better, new, old) for new, old in zip(found, best, strict=True))

    plain = span / most
    q = codes(jnp.full_like(span, most))
    _, scale, offset = jax.lax.fori_loop(0, GUESSES, guess, (error(plain, low, q), plain, low))
    return jnp.maximum(scale, 0.0), -offset


def _symmetric_scales(x: Float[Array, "n b w"]) -> Float[Array, "n b"]:
    """Scale of each block, of either sign, so that its largest number takes the one code without a twin."""
    largest = jnp.take_along_axis(x, jnp.abs(x).argmax(-1, keepdims=True), axis=-1)
    weight = x * x

    def guess(number, best):
        q = jnp.clip(jnp.round(x * _ratio(jnp.full_like(largest, -31.0) - 0.1 * number, largest)), -32, 31)
        wqx, wqq = (weight * q * x).sum(-1), (weight * q * q).sum(-1)
        scale = _ratio(wqx, wqq)
        gain = scale * wqx  # what the best scale takes off the weighted sum of squares
        better = gain > best[0]
        return jnp.where(better, gain, best[0]), jnp.where(better, scale, best[1])

    nothing = jnp.zeros(x.shape[:-1], jnp.float32)
    return jax.lax.fori_loop(0, GUESSES, guess, (nothing, nothing))[1]


def _ratio(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a / b, and 0 where b is too small to divide by."""
    none = jnp.abs(b) < SMALLEST
    return jnp.where(none, 0.0, a / jnp.where(none, 1.0, b))


def _nibbles(q: UInt8[Array, "n 256"], run: int) -> UInt8[Array, "n 128"]:
    """Two codes a byte: of each `2 * run` neighbours the first half low, the second half high."""
    pairs = q.reshape(len(q), -1, 2, run)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(q), -1)


def _bytes(x: Array) -> UInt8[Array, "n b"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1)
