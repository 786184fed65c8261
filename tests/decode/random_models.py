"""Small models with random parameters, to decode."""

import jax
import numpy as np
from flax import nnx

from moe.decode import Decoder
from moe.dispatch import Dropless
from moe.mesh import spec
from moe.nn import AttentionConfig, LatentAttentionConfig, MoEConfig, Transformer, TransformerConfig, build

VOCABULARY = 40


def config(
    layers: str = "MM", attention: AttentionConfig | LatentAttentionConfig | None = None, **moe
) -> TransformerConfig:
    """A model of width 16 in float32, with 8 experts of width 8 unless said otherwise."""
    attention = attention or AttentionConfig(heads=4, kv_heads=2, head_width=8)
    experts = MoEConfig(**{"num_experts": 8, "expert_width": 8, "dispatch": Dropless(tile=8), **moe})
    return TransformerConfig(
        vocab_size=VOCABULARY,
        width=16,
        layers=layers,
        attention=attention,
        dense_width=16,
        moe=experts,
        compute_dtype="float32",
    )


def built(config: TransformerConfig, seed: int = 0) -> tuple[Transformer, Decoder]:
    """A model, every number in it random, and the same laid out for decoding; on the mesh that is set."""
    graph, params, rest = nnx.split(jax.eval_shape(lambda: build(config, jax.random.key(0))), nnx.Param, ...)
    random, mesh = np.random.default_rng(seed), jax.sharding.get_mesh()

    def drawn(like):
        # Scales [layers, width] lie around one, and a bias takes part in the choice of experts.
        mean = 1.0 if len(like.shape) == 2 and like.shape[0] == len(config.layers) else 0.0
        value = random.normal(mean, 0.3, like.shape).astype(like.dtype)
        return jax.device_put(
            value, jax.sharding.NamedSharding(mesh, like.sharding.spec if like.sharding else jax.P())
        )

    params, rest = jax.tree.map(drawn, (params, rest))
    return nnx.merge(graph, params, rest), Decoder.of(config, params, rest)


def full_logits(model: Transformer, tokens) -> np.ndarray:
    """[B, S, V]: logits of the model that was trained, over whole sequences at once."""

    @jax.jit
    def forward(model, tokens):
        return model.logits(model(tokens)[0])

    return np.asarray(forward(model, jax.sharding.reshard(tokens, spec("batch"))))
