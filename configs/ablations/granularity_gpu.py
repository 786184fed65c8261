"""How fine should experts be? Equal active and total compute cut into more and smaller experts, on one GPU.

uv run python -m moe.data.prepare domains
uv run ablate.py configs/ablations/granularity_gpu.py

14M active parameters, 26.2M tokens a run, which is the corpus once; 3 seeds of each row. From row to row the
experts double in number, halve in width, and each token visits twice as many; only the router grows.

Expected: finer experts are better at equal active compute, with a best granularity of 8 to 12 (2507.17702).
"""

from configs.ablations.active_compute_gpu import pieces_of_one
from configs.ablations.routing_gpu import base
from moe.ablation import Ablation, Axis


def cut(experts: int, k: int, width: int) -> dict:
    """Experts of this number and width, k of them for each token."""
    return {
        "model.moe.num_experts": experts,
        "model.moe.expert_width": width,
        "model.moe.routing": pieces_of_one(k),
    }


config = Ablation(
    name="granularity_gpu",
    base=base,
    axes=(
        Axis(
            "experts",
            {
                "8x1024": cut(8, 1, 1024),
                "16x512": cut(16, 2, 512),
                "32x256": cut(32, 4, 256),
                "64x128": cut(64, 8, 128),
                "128x64": cut(128, 16, 64),
            },
        ),
    ),
    baseline={"experts": "32x256"},
    margin=0.01,
)
