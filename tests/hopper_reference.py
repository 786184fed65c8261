"""What each Hopper kernel computes, under its name, in plain JAX and float32: tile by tile of rows."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def product(x, w, groups, *, transposed=False, token=None):
    x, w = _wide(x, token), _wide(w)
    of_tile = w[groups.tile_experts(x.shape[0] // groups.tile)]
    by_tile = x.reshape(-1, groups.tile, x.shape[1])
    equation = "trd,tfd->trf" if transposed else "trd,tdf->trf"
    y = jnp.einsum(equation, by_tile, of_tile, precision=HIGHEST)
    return y.reshape(x.shape[0], -1)


def inward_transposed(h_bar, w_gate, w_up, groups):
    gate_bar, up_bar = jnp.split(h_bar, 2, axis=1)
    return product(gate_bar, w_gate, groups, transposed=True) + product(up_bar, w_up, groups, transposed=True)


def swiglu_product(x, w_gate, w_up, groups, *, token=None, keep=True):
    gate, up = (product(x, w, groups, token=token) for w in (w_gate, w_up))
    return swiglu(gate, up), jnp.concatenate([gate, up], axis=1) if keep else None


def swiglu_backward(y_bar, w_down, h, weight, groups, *, token=None):
    def weighted_output(h, weight):
        """y_bar . (weight * (hidden w_down)), row by row."""
        hidden_bar = product(y_bar, w_down, groups, transposed=True, token=token)
        return jnp.sum(weight[:, None] * swiglu(*jnp.split(h, 2, axis=1)) * hidden_bar)

    h = _wide(h)
    h_bar, weight_bar = jax.grad(weighted_output, argnums=(0, 1))(h, weight)
    return h_bar, weight[:, None] * swiglu(*jnp.split(h, 2, axis=1)), weight_bar


def weight_gradient(x, y_bar, groups, *, matrices=1, x_token=None, y_token=None):
    x, y_bar = _wide(x, x_token), _wide(y_bar, y_token)
    experts, used = groups.tile_experts(x.shape[0] // groups.tile), used_rows(groups, x.shape[0])
    by_tile = (jnp.where(used[:, None], a, 0).reshape(-1, groups.tile, a.shape[1]) for a in (x, y_bar))
    products = jnp.einsum("trd,trf->tdf", *by_tile, precision=HIGHEST)
    return jnp.split(jax.ops.segment_sum(products, experts, len(groups.group_sizes)), matrices, axis=2)


def routed_mlp(x, w_gate, w_up, w_down, combine_weight, plan):
    """Differentiable by JAX's own rules."""
    hidden, _ = swiglu_product(x, w_gate, w_up, plan.groups, token=plan.row_token(padding=0))
    rows = product(hidden, w_down, plan.groups)
    outputs = rows.at[plan.row].get(mode="fill", fill_value=0) * combine_weight[:, None]
    return jax.ops.segment_sum(outputs, plan.token, x.shape[0])


def used_rows(groups, rows):
    """[R]: which rows are no padding."""
    expert = jnp.repeat(groups.tile_experts(rows // groups.tile), groups.tile)
    return jnp.arange(rows) - groups.starts()[expert] < groups.group_sizes[expert]


def swiglu(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def _wide(x, token=None):
    return (x if token is None else x[token]).astype(jnp.float32)


def int8_product(x, x_scale, w, w_scale, groups, *, dtype):
    w = w.astype(jnp.float32) * w_scale[..., None]
    return product(x.astype(jnp.float32) * x_scale[:, None], w, groups, transposed=True).astype(dtype)


def int8_swiglu(x, x_scale, w_gate, w_up, scales, groups, *, token=None, dtype):
    x = x if token is None else x[token]
    both = (
        int8_product(x, x_scale, w, scale, groups, dtype=dtype)
        for w, scale in zip((w_gate, w_up), scales, strict=True)
    )
    return swiglu(*both)
