"""What enters a matrix, summed up: the second moments of its inputs, by way of the gradient.

`observe` hands rows on unchanged. Its gradient for an argument that plays no part, `moment`, is the sum of
x x^T over the rows x. So one backward pass through a model over `ObservedMatrix` parameters brings the second
moments of every matrix's inputs, whatever loops, devices and dispatches lie between.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.kernels.grouped_matmul import grouped_matmul, transpose_product
from moe.kernels.groups import Groups


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ObservedMatrix:
    """Matrices whose inputs are observed where products take them."""

    values: Float[Array, "*n D F"]
    """The matrices."""

    moment: Float[Array, "*n D D"]
    """Anything; its gradient is what was observed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of what is observed, so that no kernel takes it for a plain matrix of bfloat16."""
        return self.moment.dtype


@jax.custom_vjp
def observe(
    rows: Float[Array, "R D"], moment: Float[Array, "*E D D"], groups: Groups | None = None
) -> Float[Array, "R D"]:
    """The rows.

    Args:
        rows: inputs of one matrix, or grouped by expert.
        moment: gets the sum of x x^T as its gradient, of each expert's rows by themselves.
        groups: layout of grouped rows.
    """
    return rows


def _forward(rows, moment, groups):
    return rows, (rows, moment, groups)


def _backward(saved, rows_bar):
    rows, moment, groups = saved
    if groups is None:
        layout = jax.typeof(moment).sharding.spec
        found = jnp.einsum("rd,re->de", rows, rows, preferred_element_type=jnp.float32, out_sharding=layout)
    elif groups.uniform:
        each = rows.reshape(moment.shape[0], -1, rows.shape[-1])
        found = jnp.einsum("erd,erf->edf", each, each, preferred_element_type=jnp.float32)
    else:
        row = jnp.arange(rows.shape[0])
        expert = jnp.repeat(groups.tile_experts(rows.shape[0] // groups.tile), groups.tile)
        filled = row - groups.starts()[expert] < groups.group_sizes[expert]
        kept = jnp.where(filled[:, None], rows, 0)
        found = transpose_product(kept, kept, groups)
    return rows_bar, found.astype(moment.dtype), None


observe.defvjp(_forward, _backward)


def observed_grouped_matmul(
    rows: Float[Array, "R D"], w: ObservedMatrix, groups: Groups
) -> Float[Array, "R F"]:
    """`grouped_matmul` of rows that are observed."""
    return grouped_matmul(observe(rows, w.moment, groups), w.values, groups)
