"""Configs of `serving_clients.py`: the quickstart, changed into what each architecture is.

What llama.cpp takes for granted of an architecture (docs/export.md) is so here too: how combine weights are
divided, no dense layers under softmax scores, heads together as wide as the model.
"""

from dataclasses import replace

from configs.quickstart import config as QUICKSTART
from moe.balance import LoadBalanceLoss, LossFreeBias, ZLoss
from moe.experiment import Experiment
from moe.nn import AttentionConfig, LatentAttentionConfig, TransformerConfig
from moe.routing import TopK
from moe.routing.group_limited import GroupLimitedTopK

HEADS = AttentionConfig(heads=2, kv_heads=1, head_width=64)
LATENTS = LatentAttentionConfig(
    heads=2, query_rank=96, kv_rank=64, plain_width=32, rotary_width=32, value_width=64
)
SOFTMAX = (LoadBalanceLoss(), ZLoss(1e-4))
SIGMOID = (LossFreeBias(1e-2), ZLoss(1e-4))


def model(attention: AttentionConfig | LatentAttentionConfig, *, layers="MMMM", **moe) -> TransformerConfig:
    """The quickstart's model with another attention, other layers and another mixture."""
    own = QUICKSTART.model
    return replace(own, attention=attention, layers=layers, moe=replace(own.moe, **moe))


MODELS = {
    "qwen3_moe": model(replace(HEADS, qk_norm="head"), routing=TopK(k=2), balance=SOFTMAX),
    "glm4_moe": model(
        replace(HEADS, bias=True, rotary_fraction=0.5),
        layers="DMMM",
        routing=TopK(k=2, scores="sigmoid"),
        balance=SIGMOID,
        shared_experts=1,
    ),
    "olmoe": model(
        replace(HEADS, kv_heads=2, qk_norm="full"), routing=TopK(k=2, renormalize=False), balance=SOFTMAX
    ),
    "mixtral": model(HEADS, routing=TopK(k=2), balance=SOFTMAX),
    "qwen2_moe": model(
        replace(HEADS, bias=True),
        routing=TopK(k=2, renormalize=False),
        balance=SOFTMAX,
        shared_experts=1,
        shared_gate="sigmoid",
    ),
    "deepseek_v3": model(
        LATENTS,
        layers="DMMM",
        routing=GroupLimitedTopK(k=2, scores="sigmoid", scale=2.5, num_groups=4, kept_groups=2),
        balance=SIGMOID,
        shared_experts=1,
    ),
}
"""By the names of `export.py --architecture`."""


def experiment(name: str, steps: int) -> Experiment:
    """The quickstart as another architecture, trained for so many steps."""
    train = replace(QUICKSTART.train, steps=steps, evaluate_every=0)
    return replace(QUICKSTART, name=f"clients/{name}", model=MODELS[name], train=train)
