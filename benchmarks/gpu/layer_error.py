"""How far an MoE layer's results lie from float32: the reference of `moe_layer_jax.py`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHECKED_TOKENS = 1024

Weights = dict[str, Float[Array, "..."]]


def layer_errors(
    x: Float[Array, "B S D"],
    y_bar: Float[Array, "B S D"],
    weights: Weights,
    y: Float[Array, "B S D"],
    x_bar: Float[Array, "B S D"],
    weights_bar: Weights,
    *,
    k: int,
) -> dict[str, Float[Array, ""]]:
    """|result - float32 result| / |float32 result|, from the same bfloat16 inputs.

    Of the output and of the tokens' gradient over the first tokens, which go through every expert with weight
    zero where it is not theirs; of the gradients of the most used expert's matrices over all tokens.

    Args:
        x: tokens.
        y_bar: cotangents.
        weights: `router` [D, E], `w_gate` and `w_up` [E, D, F], `w_down` [E, F, D].
        y: the layer's output.
        x_bar: gradient of the tokens.
        weights_bar: gradients of the weights.
        k: experts per token.
    """
    x, y_bar, y, x_bar = (a.reshape(-1, a.shape[-1]) for a in (x, y_bar, y, x_bar))
    some = slice(None, CHECKED_TOKENS)
    with jax.default_matmul_precision("highest"):
        exact, pull = jax.vjp(lambda x: mixture(x, weights, k), x[some].astype(jnp.float32))
        exact_bar = pull(y_bar[some].astype(jnp.float32))[0]
        share = combine_weights(x.astype(jnp.float32), weights["router"], k)
        busiest = jnp.argmax((share > 0).sum(0))
        mine = {name: weights[name][busiest].astype(jnp.float32) for name in ("w_gate", "w_up", "w_down")}
        weighted = share[:, busiest, None] * y_bar.astype(jnp.float32)
        expert_bar = jax.vjp(lambda mine: expert(x.astype(jnp.float32), mine), mine)[1](weighted)[0]
    return {
        "y": relative([y[some]], [exact]),
        "x": relative([x_bar[some]], [exact_bar]),
        "w": relative([weights_bar[name][busiest] for name in mine], [expert_bar[name] for name in mine]),
    }


def mixture(x: Float[Array, "T D"], weights: Weights, k: int) -> Float[Array, "T D"]:
    """Every token through every expert, weighed."""
    share = combine_weights(x, weights["router"], k)
    experts = {name: w for name, w in weights.items() if name != "router"}

    def add(y, one):
        share, matrices = one
        return y + share[:, None] * expert(x, jax.tree.map(lambda w: w.astype(jnp.float32), matrices)), None

    return jax.lax.scan(add, jnp.zeros_like(x), (share.T, experts))[0]


def combine_weights(x: Float[Array, "T D"], router: Float[Array, "D E"], k: int) -> Float[Array, "T E"]:
    """Softmax over a token's k highest logits, zero for other experts."""
    logits = x @ router
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jax.nn.softmax(logits, where=logits >= least, axis=-1)


def expert(x: Float[Array, "T D"], w: Weights) -> Float[Array, "T D"]:
    """SwiGLU feed-forward."""
    return (jax.nn.silu(x @ w["w_gate"]) * (x @ w["w_up"])) @ w["w_down"]


def relative(found: list[Array], exact: list[Array]) -> Float[Array, ""]:
    """|found - exact| / |exact| over all arrays together."""
    wrong = sum(jnp.sum((a.astype(jnp.float32) - b) ** 2) for a, b in zip(found, exact, strict=True))
    return jnp.sqrt(wrong / sum(jnp.sum(b**2) for b in exact))
