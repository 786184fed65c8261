"""Which routing? The strategies that keep about 4 of 32 experts a token, on the ten-slice corpus, on one GPU.

uv run python -m moe.data.prepare domains
uv run ablate.py configs/ablations/routing_gpu.py

35M active parameters of 150M, 26.2M tokens a run, which is the corpus once; 3 seeds of each row. A run is cut
to end within a minute on one H100, and a killed sweep goes on where it was.

Expected: hash, random and frozen routing clearly worse than learned (2604.14419: +1.1 to +2.2 perplexity at
76-84M parameters); learned routers of different geometry within the margin of each other.
"""

from dataclasses import replace

from configs.domains import config as domains
from moe.ablation import Ablation, Axis
from moe.balance import LossFreeBias, ZLoss
from moe.checkpoint import Checkpoints
from moe.dispatch import Dropless
from moe.nn import CosineRouter, LinearRouter, MLPRouter
from moe.optim import AdamW
from moe.routing import (
    DefaultMoE,
    ExpertChoice,
    HashTokens,
    NoisyTopK,
    RandomExpert,
    Sinkhorn,
    TopK,
)

BIAS, NONE = (LossFreeBias(rate=1e-3), ZLoss(1e-3)), ()

base = replace(
    domains,
    model=replace(
        domains.model,
        width=384,
        layers="D" + 7 * "M",
        attention=replace(domains.model.attention, heads=6, kv_heads=2),
        dense_width=2048,
        moe=replace(domains.model.moe, routing=TopK(k=4), balance=BIAS, dispatch=Dropless()),
    ),
    # Muon treats every expert by itself, so rows would differ in how experts are cut and in what it makes of
    # that: a dense layer cut into 8 experts that all tokens visit gained 0.10 nats.
    optimizer=AdamW(learning_rate=2e-3, schedule=domains.optimizer.schedule),
    train=replace(domains.train, steps=400, evaluate_every=100),
    checkpoints=Checkpoints(every=400),
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
                "sinkhorn": {"model.moe.routing": Sinkhorn(k=4), "model.moe.balance": NONE},
                "expert-choice": {
                    "model.moe.routing": ExpertChoice(capacity_factor=4.0),
                    "model.moe.balance": NONE,
                },
                "frozen": {"model.moe.router": LinearRouter(trained=False)},
                "hash": {"model.moe.routing": HashTokens(k=4), "model.moe.balance": NONE},
                "random": {"model.moe.routing": RandomExpert(k=4), "model.moe.balance": NONE},
            },
        ),
    ),
    baseline={"routing": "top-4"},
    margin=0.01,
)
