"""Six of the sixteen layers of OLMoE-1B-7B: what one GPU of 80 GB trains whole, in float32 with AdamW.

    uv run train.py configs/olmoe_3b_h100.py --data.tokenizer.path tokenizer.json
    uv run benchmarks/train_step.py

The second command measures the train step on random tokens and needs neither data nor tokenizer. Both want
the memory that JAX leaves free by default: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.

Expected: 2,723,465,216 parameters, 609,536,000 active; docs/performance.md has the speed and what limits it.

Shape, data and optimizer are those of `olmoe_1b_7b`, whose docstring gives the sources, but that AdamW keeps
its first moment in bfloat16, as DeepSeek-V3 does (2412.19437, section 3.3.3). Layers are compiled one by one
(`unroll`) and nothing is recomputed.
"""

from dataclasses import replace

from configs.olmoe_1b_7b import config as olmoe
from moe.balance import LoadBalanceLoss, ZLoss
from moe.checkpoint import Checkpoints
from moe.experiment import Train

LAYERS = 6

config = replace(
    olmoe,
    name="olmoe_3b_h100",
    model=replace(
        olmoe.model,
        layers=LAYERS * "M",
        moe=replace(
            olmoe.model.moe,
            balance=(LoadBalanceLoss(1e-2 / LAYERS, sequences_per_group=4), ZLoss(1e-3 / LAYERS)),
        ),
        remat="none",
        unroll=True,
    ),
    optimizer=replace(olmoe.optimizer, first_moment="bfloat16"),
    train=Train(steps=20_000, batch_size=16, loss_chunks=16, evaluate_every=1000),
    checkpoints=Checkpoints(every=1000),
)
