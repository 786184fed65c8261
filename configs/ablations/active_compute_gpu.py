"""Do experts pay at equal active compute? Dense against 8 to 64 experts, in one to eight pieces, on one GPU.

uv run python -m moe.data.prepare domains
uv run ablate.py configs/ablations/active_compute_gpu.py

35M active parameters, 26.2M tokens a run, which is the corpus once. Each token visits as many experts as an
expert is pieces of the dense layer's width, so that every row multiplies the same; granularity G is that
number (2402.07871). E8-G8 visits all its experts: it is the dense model with a router.

Expected: at equal granularity loss falls by about the same amount from doubling to doubling of the experts
(2202.01169), and at equal total size finer experts are better (2402.07871).
"""

from configs.ablations.routing_gpu import base
from moe.ablation import Ablation, Axis
from moe.routing import TopK

WIDTH = base.model.dense_width  # of the dense layer, and of the experts of a token together


def experts(count: int, pieces: int) -> dict:
    """So many experts, each of one of so many pieces of the dense layer's width."""
    return {
        "model.moe.num_experts": count,
        "model.moe.expert_width": WIDTH // pieces,
        "model.moe.routing": TopK(
            k=pieces, renormalize=pieces > 1
        ),  # one renormalised weight would always be 1
    }


config = Ablation(
    name="active_compute_gpu",
    base=base,
    axes=(
        Axis(
            "experts",
            {"dense": {"model.layers": 8 * "D"}}
            | {f"E{n}-G{g}": experts(n, g) for g in (1, 2, 4, 8) for n in (8, 16, 32, 64)},
        ),
    ),
    baseline={"experts": "dense"},
    margin=0.01,
)
