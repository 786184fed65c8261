"""Do experts pay at equal active compute? Dense against 8 to 64 experts, in one to eight pieces, on one GPU.

uv run python -m moe.data.prepare domains
uv run ablate.py configs/ablations/active_compute_gpu.py

35M active parameters, 26.2M tokens a run, which is the corpus once. Each token visits as many experts as an
expert is pieces of the dense layer's width, so that every row multiplies the same; granularity G is that
number (2402.07871). E8-G8 visits all its experts: it is the dense model with a router.

Expected: at equal granularity loss falls by about the same amount from doubling to doubling of the experts
(2202.01169), and at equal total size finer experts are better (2402.07871).
"""

from dataclasses import replace

from configs.ablations.routing_gpu import base as routing
from moe.ablation import Ablation, Axis
from moe.routing import TopK

WIDTH = 2048  # of the dense layer, and of the experts of a token together

base = replace(
    routing,
    model=replace(
        routing.model,
        width=384,
        layers="D" + 7 * "M",
        attention=replace(routing.model.attention, heads=6, kv_heads=2),
        dense_width=WIDTH,
    ),
)


def experts(count: int, pieces: int, width: int = WIDTH) -> dict:
    """So many experts, each of one of so many pieces of a dense layer's width; a token visits that many.

    At the start outputs of experts are independent and of the dense layer's size each, so weights that sum to
    one would make their sum smaller by the root of the pieces (the gate scaling factor of 2502.16982). One
    weight alone would always be 1 if it were renormalised, and teach the router nothing.
    """
    return {
        "model.moe.num_experts": count,
        "model.moe.expert_width": width // pieces,
        "model.moe.routing": TopK(k=pieces, renormalize=pieces > 1, scale=pieces**0.5),
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
