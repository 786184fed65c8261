"""How fine should experts be? Equal active and total compute cut into more and smaller experts, on one GPU.

uv run python -m moe.data.prepare domains
uv run ablate.py configs/ablations/granularity_gpu.py

14M active parameters, 26.2M tokens a run, which is the corpus once; 3 seeds of each row. From row to row the
experts double in number, halve in width, and each token visits twice as many; only the router grows.

Expected: finer experts are better at equal active compute, with a best granularity of 8 to 12 (2507.17702).
"""

from configs.ablations.active_compute_gpu import experts
from configs.ablations.routing_gpu import base
from moe.ablation import Ablation, Axis

WIDTH = base.model.dense_width

config = Ablation(
    name="granularity_gpu",
    base=base,
    axes=(
        Axis(
            "experts",
            {f"{8 * g}x{WIDTH // g}": experts(8 * g, g, WIDTH) for g in (1, 2, 4, 8, 16)},
        ),
    ),
    baseline={"experts": "32x256"},
    margin=0.01,
)
