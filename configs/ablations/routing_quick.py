"""Does learning the route help, does balancing, do finer experts? Small enough for two CPU cores.

uv run ablate.py configs/ablations/routing_quick.py

Two layers of width 64 with 32 experts of width 64, 2 a token (0.95M parameters, 0.21M active), on 1.4M
tokens: 6 rows, 3 seeds, about a minute a run on two quiet cores. Rows differ by less than 1 % in active
FLOPs; hash and random routing get wider experts for the router that they lack.

Expected (docs/results/routing_quick, mean difference in validation loss and 95 % interval over seeds, nats
per token): hash +0.126 [0.074, 0.177], random +0.327 [0.273, 0.381] and frozen routing +0.081 [0.036,
0.126] worse than learned (2604.14419); without balancing a MaxVio of 13.2 instead of 0.4 (2408.15664 table
2), and +0.087 [0.044, 0.130]. Undecided by three seeds: 16 experts of twice the width, 1 a token, instead of
32, 2 a token, +0.019 [-0.071, 0.108], where 2507.17702 finds finer experts ahead. The size of a run
matters: on 0.3M tokens, where the identity of a token is most of what can be learned, hash routing is
ahead.
"""

from dataclasses import replace

from configs.quickstart import config as quickstart
from moe.ablation import Ablation, Axis
from moe.balance import LossFreeBias, ZLoss
from moe.checkpoint import Checkpoints
from moe.data import Data, TrainedBPE
from moe.nn import AttentionConfig, LinearRouter
from moe.optim import WSD, Muon
from moe.routing import HashTokens, RandomExpert, TopK

base = replace(
    quickstart,
    data=Data(tokenizer=TrainedBPE(vocab_size=1024), sequence_length=128),
    model=replace(
        quickstart.model,
        vocab_size=1024,
        width=64,
        layers="MM",
        attention=AttentionConfig(heads=2, kv_heads=1, head_width=32, qk_norm="head"),
        moe=replace(quickstart.model.moe, num_experts=32, expert_width=64),
    ),
    optimizer=Muon(learning_rate=1.2e-2, schedule=WSD(warmup=30, decay_fraction=0.5, final=0.02)),
    train=replace(quickstart.train, steps=340, batch_size=32, loss_chunks=1, evaluate_every=85),
    checkpoints=Checkpoints(every=170),
)

config = Ablation(
    name="routing_quick",
    base=base,
    axes=(
        Axis(
            "routing",
            {
                "learned": {},
                "unbalanced": {"model.moe.balance": (ZLoss(1e-4),)},
                "frozen": {
                    "model.moe.router": LinearRouter(trained=False),
                    "model.moe.balance": (LossFreeBias(rate=1e-2),),
                },
                "hash": {
                    "model.moe.routing": HashTokens(k=2),
                    "model.moe.balance": (),
                    "model.moe.expert_width": 68,
                },
                "random": {
                    "model.moe.routing": RandomExpert(k=2),
                    "model.moe.balance": (),
                    "model.moe.expert_width": 68,
                },
                "coarse": {
                    "model.moe.num_experts": 16,
                    "model.moe.expert_width": 132,
                    "model.moe.routing": TopK(k=1, renormalize=False),
                },
            },
        ),
    ),
    baseline={"routing": "learned"},
    margin=0.01,
)
