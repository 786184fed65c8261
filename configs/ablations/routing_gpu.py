"""Which routing? The strategies that keep about 4 of 32 experts a token, on the ten-slice corpus, on one GPU.

uv run python -m moe.data.prepare domains
uv run ablate.py configs/ablations/routing_gpu.py

14M active parameters of 42M, 26.2M tokens a run, which is the corpus once; 3 seeds of each row. A
killed sweep goes on where it was.

Expected: hash, random and frozen routing clearly worse than learned (2604.14419: +1.1 to +2.2 perplexity at
76-84M parameters); learned routers of different geometry within the margin of each other.
"""

from dataclasses import replace

from configs.domains import config as domains
from moe.ablation import Ablation, Axis
from moe.checkpoint import Checkpoints
from moe.nn import CosineRouter, LinearRouter, MLPRouter
from moe.optim import WSD
from moe.routing import (
    DefaultMoE,
    ExpertChoice,
    HashTokens,
    NoisyTopK,
    RandomExpert,
    Sinkhorn,
    TopK,
)

base = replace(
    domains,
    model=replace(
        domains.model,
        width=256,
        layers="D" + 5 * "M",
        attention=replace(domains.model.attention, heads=4, kv_heads=2),
        dense_width=1024,
        moe=replace(domains.model.moe, expert_width=256),
    ),
    # The best of 2e-3, 4e-3 and 8e-3 for active_compute_gpu's larger model: docs/results/active_compute_gpu.
    optimizer=replace(
        domains.optimizer, learning_rate=8e-3, schedule=WSD(warmup=50, decay_fraction=0.5, final=0.02)
    ),
    train=replace(domains.train, steps=400, evaluate_every=200),
    checkpoints=Checkpoints(every=0),
)

config = Ablation(
    name="routing_gpu",
    base=base,
    axes=(
        Axis(
            "routing",
            {
                "top-4": {},
                "sigmoid": {"model.moe.routing": TopK(k=4, scores="sigmoid")},
                "noisy": {"model.moe.routing": NoisyTopK(k=4)},
                "cosine": {"model.moe.router": CosineRouter()},
                "mlp": {"model.moe.router": MLPRouter(hidden=128)},
                "default-moe": {"model.moe.routing": DefaultMoE(k=4)},
                "sinkhorn": {"model.moe.routing": Sinkhorn(k=4), "model.moe.balance": ()},
                "expert-choice": {
                    "model.moe.routing": ExpertChoice(capacity_factor=4.0),
                    "model.moe.balance": (),
                },
                "frozen": {"model.moe.router": LinearRouter(trained=False)},
                "hash": {"model.moe.routing": HashTokens(k=4), "model.moe.balance": ()},
                "random": {"model.moe.routing": RandomExpert(k=4), "model.moe.balance": ()},
            },
        ),
    ),
    baseline={"routing": "top-4"},
    margin=0.01,
)
