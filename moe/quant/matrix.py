"""A quantised matrix, and the way there and back."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.quant.format import Format


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """Matrices [..., D, F] as codes and scales, stored [..., F, D]: what a product sums over lies together.

    That is how the 8-bit tensor cores of Hopper want both operands, and the dot instructions of CPUs.
    """

    values: Int[Array, "*n F D"]
    """The codes; int4 packed [*n, F, D / 2]: input d in the low half of byte d, input d + D / 2 in the high
    half, each as code + 8."""

    scales: Float[Array, "*n F G"]
    """What a code of one stands for: of each output channel, and in it of each group of D / G inputs."""

    format: Format = field(metadata={"static": True})

    @staticmethod
    def of_codes(codes: Int[Array, "*n D F"], scales: Float[Array, "*n G F"], format: Format):
        """Put together what `round_to` and `find_scales` gave."""
        codes = jnp.swapaxes(codes, -1, -2)
        if format.codes == "int4":
            low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis=-1)
            codes = low | (high << 4)
        return QuantizedMatrix(codes, jnp.swapaxes(scales, -1, -2), format)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., D, F] of the matrices that this stands for."""
        *leading, outputs, stored = self.values.shape
        return *leading, stored * self.values.dtype.itemsize * 8 // self.format.bits, outputs

    @property
    def ndim(self) -> int:
        """Axes of `shape`."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of what is stored."""
        return self.values.dtype

    def __getitem__(self, index) -> "QuantizedMatrix":
        """Some of the matrices, by their leading axes."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def planes(self) -> list[tuple[Int[Array, "*n F d"], Float[Array, "*n F g"]]]:
        """Codes and scales along the inputs, in parts that need no shuffling: one, or the halves of int4."""
        if self.format.codes != "int4":
            return [(self.values, self.scales)]
        low, high = (self.values & 15).astype(jnp.int8) - 8, (self.values >> 4).astype(jnp.int8) - 8
        # An odd number of groups is cut in the middle of one: then every scale counts for both its halves.
        scales = jnp.repeat(self.scales, 2, axis=-1) if self.scales.shape[-1] % 2 else self.scales
        return list(zip((low, high), jnp.split(scales, 2, axis=-1), strict=True))

    def codes(self) -> Int[Array, "*n F D"]:
        """The codes, unpacked."""
        return jnp.concatenate([codes for codes, _ in self.planes()], axis=-1)


def quantize(
    w: Float[Array, "*n D F"],
    format: Format,
    *,
    clip: Float[Array, "*n G F"] | None = None,
    noise: Float[Array, "*n D F"] | None = None,
) -> QuantizedMatrix:
    """The matrices in the nearest codes.

    Args:
        w: each with inputs along the second axis from behind, outputs along the last.
        format: of the codes.
        clip: share of each group's largest weight that is the largest code; None: all of it.
        noise: see `round_to`.

    Raises:
        UserError: the format does not fit the number of inputs.
    """
    scales = find_scales(w, format, clip)
    return QuantizedMatrix.of_codes(round_to(w, scales, format, noise), scales, format)


def dequantize(w: QuantizedMatrix, dtype: jnp.dtype | None = None) -> Float[Array, "*n D F"]:
    """The matrices that a quantised one stands for, float32 unless said otherwise."""
    wide = jnp.concatenate([rescale(codes, scales) for codes, scales in w.planes()], axis=-1)
    return jnp.swapaxes(wide, -1, -2).astype(dtype or jnp.float32)


def find_scales(
    w: Float[Array, "*n D F"], format: Format, clip: Float[Array, "*n G F"] | None = None
) -> Float[Array, "*n G F"]:
    """Scales with which the largest weight of a group, or `clip` times it, takes the largest code."""
    grouped = _in_groups(w.astype(jnp.float32), format.groups(w.shape[-2]))
    largest = jnp.max(jnp.abs(grouped), axis=-2) / format.largest
    scales = largest if clip is None else clip * largest
    return jnp.maximum(scales, jnp.finfo(jnp.float32).tiny).astype(format.scale_dtype)


def round_to(
    w: Float[Array, "*n D F"],
    scales: Float[Array, "*n G F"],
    format: Format,
    noise: Float[Array, "*n D F"] | None = None,
) -> Int[Array, "*n D F"]:
    """The codes nearest to the weights.

    With noise drawn evenly from [0, 1) one of the two nearest, so that a weight is right on average
    (stochastic rounding, 1502.02551).
    """
    v = _in_groups(w.astype(jnp.float32), scales.shape[-2]) / scales[..., None, :].astype(jnp.float32)
    if format.codes != "fp8":
        v = jnp.round(v) if noise is None else jnp.floor(v + noise.reshape(v.shape))
    return jnp.clip(v, -format.largest, format.largest).astype(format.dtype).reshape(w.shape)


def rescale(codes: Int[Array, "*n F D"], scales: Float[Array, "*n F G"]) -> Float[Array, "*n F D"]:
    """Codes times the scales of their groups, along the last axis, in float32."""
    grouped = codes.reshape(*scales.shape, -1).astype(jnp.float32)
    return (grouped * scales[..., None].astype(jnp.float32)).reshape(codes.shape)


def _in_groups(w, groups: int):
    """[..., D, F] -> [..., G, D / G, F]."""
    return w.reshape(*w.shape[:-2], groups, -1, w.shape[-1])
