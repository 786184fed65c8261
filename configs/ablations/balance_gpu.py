"""Which balancing? Every balancer for top-4 of 32 experts, on the ten-slice corpus, on one GPU.

uv run python -m moe.data.prepare domains
uv run ablate.py configs/ablations/balance_gpu.py

14M active parameters, 26.2M tokens a run, which is the corpus once; 3 seeds of each row. Scores are
sigmoids, as in the papers of biases, whose steps are then small beside a score.

Expected: the loss-free bias balances far better than the auxiliary loss at no cost in quality (2408.15664
table 2: perplexity 9.50 against 9.56, MaxVio 0.04 against 0.72); the auxiliary loss over the whole batch
costs less than over a sequence (2501.11873: about 0.1 perplexity).
"""

from dataclasses import replace

from configs.ablations.routing_gpu import base
from moe.ablation import Ablation, Axis
from moe.balance import (
    ImportanceLoss,
    LoadBalanceLoss,
    LossFreeBias,
    QuantileBias,
    SimBal,
)
from moe.routing import TopK

config = Ablation(
    name="balance_gpu",
    base=replace(
        base,
        model=replace(base.model, moe=replace(base.model.moe, routing=TopK(k=4, scores="sigmoid"))),
    ),
    axes=(
        Axis(
            "balance",
            {
                "loss-free": {"model.moe.balance": (LossFreeBias(rate=1e-3),)},
                "none": {"model.moe.balance": ()},
                "sequence": {"model.moe.balance": (LoadBalanceLoss(1e-2, sequences_per_group=1),)},
                "8-sequences": {"model.moe.balance": (LoadBalanceLoss(1e-2, sequences_per_group=8),)},
                "whole-batch": {"model.moe.balance": (LoadBalanceLoss(1e-2),)},
                "importance": {"model.moe.balance": (ImportanceLoss(1e-2),)},
                "proportional": {"model.moe.balance": (LossFreeBias(rate=1e-3, rule="proportional"),)},
                "quantile": {"model.moe.balance": (QuantileBias(scores="sigmoid"),)},
                "simbal": {"model.moe.balance": (SimBal(),)},
            },
        ),
    ),
    baseline={"balance": "loss-free"},
    margin=0.01,
)
