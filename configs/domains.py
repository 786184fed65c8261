"""The ten-slice corpus on one GPU: do experts specialise by language and kind of text?

    uv run python -m moe.data.prepare domains
    uv run train.py configs/domains.py

The first command downloads 79 MB of Debian packages and makes ten slices of them, about 27M tokens:
software help and manual pages in English, German, French and Chinese, prose, and code. The run goes over
them five times.

Expected: 305,592,320 parameters, 63,371,264 active. `uv run eval.py runs/domains` then shows loss and bits
per byte of each slice and the load of each layer's experts.
"""

from moe.balance import LoadBalanceLoss, ZLoss
from moe.checkpoint import Checkpoints
from moe.data import Data, Domains, TrainedBPE
from moe.dispatch import Dropless
from moe.experiment import Experiment, Train
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig
from moe.optim import WSD, Muon
from moe.routing import TopK

config = Experiment(
    name="domains",
    data=Data(corpus=Domains(), tokenizer=TrainedBPE(16_384), sequence_length=1024),
    model=TransformerConfig(
        vocab_size=16_384,
        width=512,
        layers="D" + 11 * "M",
        attention=AttentionConfig(heads=8, kv_heads=4, head_width=64, qk_norm="head"),
        dense_width=1536,
        moe=MoEConfig(
            num_experts=32,
            expert_width=512,
            routing=TopK(k=4),
            balance=(LoadBalanceLoss(1e-2), ZLoss(1e-3)),
            dispatch=Dropless(),
        ),
    ),
    optimizer=Muon(
        learning_rate=2e-3, products="bfloat16", schedule=WSD(warmup=100, decay_fraction=0.4, final=0.05)
    ),
    train=Train(steps=2000, batch_size=64, loss_chunks=4, evaluate_every=250),
    checkpoints=Checkpoints(every=250),
)
