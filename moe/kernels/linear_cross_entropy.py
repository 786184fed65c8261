"""Cross-entropy of the next token straight from hidden states, without ever holding all logits.

Logits are made for a part of the sequence at a time; where a gradient is wanted, it is made in the same pass,
so that no logits are kept and none are made twice (as in Liger kernel, 2410.10989, section 3.2).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int


def linear_cross_entropy(
    hidden: Float[Array, "B S D"], head: Float[Array, "D V"], targets: Int[Array, "B S"], chunks: int
) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """Mean of -log softmax(hidden @ head)[target], and its terms, nats, float32.

    Only the mean is differentiable. Logits and their exponentials are float32, their gradient is rounded to
    the dtype of `hidden` for the two products it enters.

    Args:
        hidden: final hidden states, split along batch and sequence.
        head: output matrix, whole on every device.
        targets: token ids.
        chunks: parts of the sequence, a divisor of the S that one device has.
    """
    # Checkers take a custom_vjp made through `partial` for an object without a type.
    mean_and_terms: Any = _linear_cross_entropy(hidden, head, targets, chunks)
    return mean_and_terms


def reference(hidden, head, targets) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """The same in plain JAX, from all logits at once."""
    logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return nll.mean(), nll


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_cross_entropy(hidden, head, targets, chunks):
    nll, _, _ = _by_chunks(hidden, head, targets, chunks, with_gradient=False)
    return nll.mean(), nll


def _forward(hidden, head, targets, chunks):
    nll, hidden_bar, head_bar = _by_chunks(hidden, head, targets, chunks, with_gradient=True)
    return (nll.mean(), nll), (hidden_bar, head_bar)


def _backward(chunks, gradients, cotangents):
    mean_bar, _ = cotangents
    hidden_bar, head_bar = gradients
    return (hidden_bar * mean_bar.astype(hidden_bar.dtype)), head_bar * mean_bar.astype(head_bar.dtype), None


_linear_cross_entropy.defvjp(_forward, _backward)


def _by_chunks(hidden, head, targets, chunks, *, with_gradient):
    """nll [B, S], and the gradients of its mean or None."""
    layout = P(*jax.typeof(hidden).sharding.spec[:2])
    tokens = targets.size

    def on_one_device(hidden, head, targets):
        rows, sequence, _ = hidden.shape

        def part(x):  # [B, S, ...] -> [chunks, tokens of a chunk, ...]
            cut = x.reshape(rows, chunks, sequence // chunks, *x.shape[2:]).swapaxes(0, 1)
            return cut.reshape(chunks, rows * sequence // chunks, *x.shape[2:])

        def whole(x):  # and back
            return (
                x.reshape(chunks, rows, sequence // chunks, *x.shape[2:])
                .swapaxes(0, 1)
                .reshape(rows, sequence, *x.shape[2:])
            )

        def one(head_bar, xs):
            h, h_columns, target = xs
            logits = jnp.dot(h, head, preferred_element_type=jnp.float32)
            hit = target[:, None] == jnp.arange(logits.shape[-1])
            log_total = _log_total(logits)[:, None]
            nll = log_total[:, 0] - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
            if not with_gradient:
                return head_bar, (nll, None)
            logits_bar = ((jnp.exp(logits - log_total) - hit) / tokens).astype(h.dtype)
            head_bar += jnp.dot(h_columns, logits_bar, preferred_element_type=jnp.float32)
            return head_bar, (nll, logits_bar @ head_rows)

        # Transposed once, outside the loop: XLA's CPU bf16 product is slow on a transposed operand.
        head_rows = head.T
        parts = part(hidden)
        columns = parts.swapaxes(1, 2) if with_gradient else None
        head_bar = jnp.zeros_like(hidden, shape=head.shape, dtype=jnp.float32) if with_gradient else None
        head_bar, (nll, hidden_bar) = jax.lax.scan(one, head_bar, (parts, columns, part(targets)))
        if not with_gradient:
            return whole(nll), None, None
        axes = tuple(jax.typeof(hidden).mat.varying)
        return whole(nll), whole(hidden_bar), jax.lax.psum(head_bar, axes).astype(head.dtype)

    return jax.shard_map(
        on_one_device,
        in_specs=(layout, P(), layout),
        out_specs=(layout, layout if with_gradient else None, P() if with_gradient else None),
    )(hidden, head, targets)


def _log_total(logits: Float[Array, "T V"]) -> Float[Array, "T"]:
    """logsumexp over the vocabulary."""
    return jax.lax.platform_dependent(
        logits, cuda=_log_total_in_one_pass, default=partial(jax.nn.logsumexp, axis=-1)
    )


def _log_total_in_one_pass(logits: Float[Array, "T V"]) -> Float[Array, "T"]:
    """The same from one reading of the logits (1805.02867, section 3.1), where memory is what takes the time.

    Every pair of parts is joined as (largest, sum of exp(logit - largest)).
    """

    def join(a, b):
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    nothing = (jnp.finfo(logits.dtype).min, 0.0)
    largest, total = jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, join, dimensions=(1,))
    return largest + jnp.log(total)
