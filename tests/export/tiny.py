"""Tiny models, one for each architecture, and their weights drawn at random."""

from dataclasses import replace

import numpy as np

from moe.balance import LossFreeBias
from moe.export.tensors import leaves
from moe.nn import AttentionConfig, LatentAttentionConfig, MoEConfig, TransformerConfig
from moe.routing import TopK
from moe.routing.group_limited import GroupLimitedTopK

BODY = TransformerConfig(vocab_size=300, width=32, dense_width=48, compute_dtype="float32")
HEADS = AttentionConfig(heads=4, kv_heads=2, head_width=8)
EXPERTS = MoEConfig(num_experts=4, expert_width=16, routing=TopK(k=2))
BIAS = (LossFreeBias(),)

MODELS = {
    "qwen3_moe": replace(
        BODY,
        layers="DMDM",
        attention=replace(HEADS, head_width=16, qk_norm="head", rope_theta=500.0),
        moe=replace(EXPERTS, routing=TopK(k=2, renormalize=False)),
        tied_embedding=True,
    ),
    "glm4_moe": replace(
        BODY,
        layers="DMM",
        attention=replace(HEADS, head_width=16, qk_norm="head", rotary_fraction=0.5, bias=True),
        moe=replace(
            EXPERTS,
            routing=GroupLimitedTopK(k=2, scores="sigmoid", scale=1.5, num_groups=2, kept_groups=1),
            balance=BIAS,
            shared_experts=2,
        ),
        norm_epsilon=1e-5,
    ),
    "olmoe": replace(BODY, layers="MM", attention=replace(HEADS, qk_norm="full"), moe=EXPERTS),
    "mixtral": replace(BODY, layers="MM", attention=HEADS, moe=EXPERTS),
    "qwen2_moe": replace(
        BODY,
        layers="MDM",
        attention=replace(HEADS, bias=True),
        moe=replace(EXPERTS, shared_experts=1, shared_width=24, shared_gate="sigmoid"),
    ),
    "deepseek_v3": replace(
        BODY,
        layers="DMM",
        attention=LatentAttentionConfig(
            heads=4, query_rank=24, kv_rank=16, plain_width=8, rotary_width=4, value_width=6
        ),
        moe=replace(
            EXPERTS,
            routing=GroupLimitedTopK(k=2, scores="sigmoid", scale=2.5, num_groups=2, kept_groups=1),
            balance=BIAS,
            shared_experts=1,
        ),
    ),
}

MODELS |= {
    "qwen3": replace(BODY, layers="DD", attention=replace(HEADS, qk_norm="head", head_width=16)),
    "llama": replace(BODY, layers="DD", attention=HEADS, tied_embedding=True),
    "qwen2": replace(BODY, layers="DD", attention=replace(HEADS, bias=True)),
}

# What an architecture always has and these have not: zeros there carry them.
WITHOUT = {
    "glm4_moe": replace(
        BODY,
        layers="MM",
        attention=replace(HEADS, qk_norm="head"),
        moe=replace(EXPERTS, routing=TopK(k=2, scores="sigmoid"), balance=()),
    ),
    "qwen2_moe": replace(
        BODY, layers="MM", attention=HEADS, moe=replace(EXPERTS, routing=TopK(k=1, renormalize=False))
    ),
}


class RandomWeights:
    """Every parameter of a model, norms and biases too, drawn at random."""

    def __init__(self, model: TransformerConfig, seed: int = 0):
        random = np.random.default_rng(seed)
        self.arrays = {
            name: (
                0.2 * random.standard_normal(leaf.shape) + (1.0 if name.endswith("scale") else 0.0)
            ).astype(np.float32)
            for name, leaf in leaves(model).items()
        }

    def read(self, leaf: str, place: int | None) -> np.ndarray | None:
        """See `moe.export.assemble.ReadWeights`."""
        array = self.arrays.get(leaf)
        return array if array is None or place is None else array[place]
