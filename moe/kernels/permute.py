"""Between tokens and rows grouped by expert: the map, and the two moves along it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.kernels.groups import Groups

MOST_GATHERS = 16  # of one fusion: more cost more to compile than they save


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """A one-to-one map between assignments and rows, for the tokens and experts of one device."""

    row: Int[Array, "A"]
    """Row of each assignment; R where it has none (dropped, or another device's expert)."""

    token: Int[Array, "A"]
    """Token of each assignment."""

    assignment: Int[Array, "R"]
    """Assignment of each row; A where the row is padding."""

    dropped: Bool[Array, "A"]
    """Assignments lost for want of capacity."""

    groups: Groups

    per_token: int | None = jax.tree.static()
    """K where assignments are token-major with exactly K a token (see `Routing`)."""

    @staticmethod
    def build(row, token, dropped, groups: Groups, rows: int, per_token: int | None) -> "Plan":
        """Complete a plan from each assignment's row by inverting it."""
        assignments = row.shape[0]
        assignment = jnp.full_like(row, assignments, shape=(rows,))
        assignment = assignment.at[row].set(jnp.arange(assignments), mode="drop")
        return Plan(row, token, assignment, dropped, groups, per_token)

    def row_token(self, padding: int) -> Int[Array, "R"]:
        """Token of each row; `padding` where the row is that."""
        return self.token.at[self.assignment].get(mode="fill", fill_value=padding)

    def row_weight(self, combine_weight: Float[Array, "A"]) -> Float[Array, "R"]:
        """Combine weight of each row; zero where the row is padding."""
        return combine_weight.at[self.assignment].get(mode="fill", fill_value=0)

    def from_rows(self, values: Float[Array, "R"]) -> Float[Array, "A"]:
        """Each assignment's number among those of the rows; zero where it has no row."""
        return values.at[self.row].get(mode="fill", fill_value=0)


@jax.custom_vjp
def gather_rows(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "R D"]:
    """Each row's token; rows of padding hold zeros.

    The gradient is a gather too: a token's cotangent is the sum over its K rows, so nothing is scattered.
    """
    token = plan.row_token(padding=x.shape[0])
    return x.at[token].get(mode="fill", fill_value=0)


@jax.custom_vjp
def combine_rows(
    rows: Float[Array, "R D"], combine_weight: Float[Array, "A"], plan: Plan, tokens: Float[Array, "T"]
) -> Float[Array, "T D"]:
    """Weighted sum of each token's rows; an assignment without a row adds nothing.

    Args:
        rows: expert outputs.
        combine_weight: gate value of each assignment, float32.
        plan: the map.
        tokens: any array whose length is the number of tokens.
    """
    return sum_by_token(rows, plan, tokens.shape[0], combine_weight)


def assignment_rows(rows: Float[Array, "R D"], plan: Plan) -> Float[Array, "A D"]:
    """Each assignment's row; zeros where it has none."""
    return rows.at[plan.row].get(mode="fill", fill_value=0)


def sum_by_token(
    rows: Float[Array, "R D"], plan: Plan, tokens: int, weight: Float[Array, "A"] | None = None
) -> Float[Array, "T D"]:
    """Each token's rows, times their weights if given, summed in float32 or wider."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    weight = jnp.ones_like(plan.row, dtype=wide) if weight is None else weight.astype(wide)

    def weighted(row, weight):
        return rows.at[row].get(mode="fill", fill_value=0).astype(wide) * weight[..., None]

    if plan.per_token is None:
        total = jax.ops.segment_sum(weighted(plan.row, weight), plan.token, num_segments=tokens)
        return total.astype(rows.dtype)
    row, weight = (a.reshape(tokens, plan.per_token) for a in (plan.row, weight))
    if plan.per_token > MOST_GATHERS:
        return weighted(row, weight).sum(1).astype(rows.dtype)
    # One gather for each choice, all in one fusion: XLA's CPU sum over a short inner axis is slow.
    choices = [weighted(row[:, j], weight[:, j]) for j in range(plan.per_token)]
    return sum(choices[1:], start=choices[0]).astype(rows.dtype)


def _gather_forward(x, plan):
    return gather_rows(x, plan), (plan, jnp.zeros_like(x, shape=(x.shape[0],)))


def _gather_backward(saved, rows_bar):
    plan, tokens = saved
    return sum_by_token(rows_bar, plan, tokens.shape[0]), None


def _combine_forward(rows, combine_weight, plan, tokens):
    return combine_rows(rows, combine_weight, plan, tokens), (rows, combine_weight, plan, tokens)


def _combine_backward(saved, y_bar):
    rows, combine_weight, plan, tokens = saved
    row_y_bar = y_bar.at[plan.row_token(padding=tokens.shape[0])].get(mode="fill", fill_value=0)
    rows_bar = row_y_bar * plan.row_weight(combine_weight)[:, None].astype(rows.dtype)
    row_products = jnp.sum(row_y_bar.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1)
    return rows_bar, plan.from_rows(row_products).astype(combine_weight.dtype), None, None


gather_rows.defvjp(_gather_forward, _gather_backward)
combine_rows.defvjp(_combine_forward, _combine_backward)
