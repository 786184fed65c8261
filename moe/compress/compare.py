"""What a change of weights does to a model's answers: the same tokens through both, sequence by sequence."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moe.mesh import spec
from moe.training.evaluate import to_devices


@dataclass(frozen=True)
class Answers:
    """Sums over the targets of each sequence, float64 [sequences]."""

    before: np.ndarray
    """Negative log-likelihood under the first parameters, nats."""

    after: np.ndarray
    """The same under the second."""

    divergence: np.ndarray
    """KL(before || after) of the next token's distribution, nats."""

    agreed: np.ndarray
    """Targets for which both think the same token likeliest."""

    targets: np.ndarray
    """Tokens predicted."""

    text_bytes: np.ndarray
    """UTF-8 bytes that they stand for."""

    def summary(self) -> dict[str, float]:
        """Quality before and after, over all sequences."""
        targets, text_bytes = self.targets.sum(), self.text_bytes.sum()
        before, after = self.before.sum(), self.after.sum()
        return {
            "loss_before": before / targets,
            "loss_after": after / targets,
            "bits_per_byte_before": before / math.log(2) / text_bytes,
            "bits_per_byte_after": after / math.log(2) / text_bytes,
            "relative_increase": after / before - 1,
            "agreement": self.agreed.sum() / targets,
            "divergence": self.divergence.sum() / targets,
            "targets": int(targets),
            "text_bytes": int(text_bytes),
        }


def together(parts: Iterable[Answers]) -> Answers:
    """The sequences of all parts."""
    return _joined([vars(part) for part in parts])


def _joined(parts: list[dict[str, np.ndarray]]) -> Answers:
    return Answers(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def compare(
    step: Callable[..., dict[str, Array]],
    before: nnx.State,
    after: nnx.State,
    controllers: nnx.State,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: Array,
) -> Answers:
    """Run batches through both models.

    Args:
        step: from `make_comparison_step`.
        before: the first parameters.
        after: the second, of the same model, quantised or not.
        controllers: state of balance controllers, the same for both.
        batches: `tokens` and `weight` of this host's rows; rows that only fill a batch are left out.
        token_bytes: [V] UTF-8 bytes of each token.
    """
    parts = []
    for batch in batches:
        arrays = (to_devices(batch["tokens"]), to_devices(batch["weight"]))
        found = jax.device_get(step(before, after, controllers, *arrays, token_bytes))
        real = found["targets"] > 0
        parts.append({name: np.float64(values[real]) for name, values in found.items()})
    return _joined(parts)


def make_comparison_step(graph: nnx.GraphDef, *, chunks: int = 1) -> Callable[..., dict[str, Array]]:
    """Build the compiled step: (before, after, controllers, tokens [B, S+1], weight [B, S], token_bytes [V]).

    It returns the fields of `Answers`, whole on every host.

    Args:
        graph: structure of the model.
        chunks: parts of the sequence whose logits are made one after the other.
    """

    def step(before, after, controllers, tokens, weight, token_bytes):
        def logits(params):
            model = nnx.merge(graph, params, controllers)
            hidden, _ = model(tokens[:, :-1], weight > 0)
            return [model.logits(part) for part in jnp.split(hidden, chunks, axis=1)]

        targets = tokens[:, 1:]
        per_part = [
            _of_logits(*parts)
            for parts in zip(logits(before), logits(after), jnp.split(targets, chunks, axis=1), strict=True)
        ]
        sums = jax.tree.map(lambda *x: jnp.sum(jnp.concatenate(x, axis=1) * weight, axis=1), *per_part)
        text_bytes = jnp.sum(token_bytes.at[targets].get(out_sharding=spec("batch")) * weight, axis=1)
        sums |= {"targets": weight.sum(1), "text_bytes": text_bytes}
        return jax.tree.map(lambda x: jax.sharding.reshard(x, spec()), sums)

    return jax.jit(step)


def _of_logits(before: Float[Array, "B S V"], after: Float[Array, "B S V"], targets):
    """[B, S] each: both losses, the divergence, and where the likeliest token is the same."""
    log_p, log_q = (jax.nn.log_softmax(logits, axis=-1) for logits in (before, after))
    hit = targets[..., None] == jnp.arange(before.shape[-1])
    return {
        "before": -jnp.sum(jnp.where(hit, log_p, 0.0), axis=-1),
        "after": -jnp.sum(jnp.where(hit, log_q, 0.0), axis=-1),
        "divergence": jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1),
        "agreed": jnp.argmax(before, axis=-1) == jnp.argmax(after, axis=-1),
    }
