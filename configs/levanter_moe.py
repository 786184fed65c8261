"""The shape of the strongest published mixture of experts in JAX on GPUs: Marin's, on Levanter, 8 H100.

    uv run train.py configs/levanter_moe.py --data.tokenizer.path tokenizer.json
    uv run benchmarks/train_step.py --config configs/levanter_moe.py

Published for it: 210k tokens/s on 8 H100 at 26.7 % MFU, with 24 layers of width 2048, 64 experts of which a
token visits 4, one shared expert, and sequences of 4096. Not published with these figures are the other
widths. Here they stand to the model's width as in Marin's larger models (github.com/marin-community/marin,
issue 7201): experts of half the width, a shared expert of all of it, four query heads for one of keys and
values; a vocabulary of 128,256. That makes 9.7 GFLOP of training for each token, where the published rates
imply 10.1.

Expected: 10,745,907,200 parameters, 1,686,210,560 active. `tokenizer.json` is that of
huggingface.co/meta-llama/Llama-3.1-8B. Optimizer and schedule are OLMoE's.
"""

from dataclasses import replace

from configs.olmoe_1b_7b import config as olmoe
from moe.balance import LoadBalanceLoss, ZLoss
from moe.data import HuggingFace, TokenizerFile
from moe.experiment import Train
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig
from moe.routing import TopK

config = replace(
    olmoe,
    name="levanter_moe",
    data=replace(
        olmoe.data,
        corpus=HuggingFace("HuggingFaceFW/fineweb-edu"),
        tokenizer=TokenizerFile("tokenizer.json", end_of_text="<|end_of_text|>"),
    ),
    model=TransformerConfig(
        vocab_size=128_256,
        width=2048,
        layers=24 * "M",
        attention=AttentionConfig(heads=16, kv_heads=4, head_width=128),
        moe=MoEConfig(
            num_experts=64,
            expert_width=1024,
            routing=TopK(k=4, renormalize=True),
            balance=(LoadBalanceLoss(1e-2 / 24), ZLoss(1e-3 / 24)),
            shared_experts=2,  # as one of 2048
        ),
        remat="full",
    ),
    optimizer=replace(olmoe.optimizer, first_moment="bfloat16"),
    train=Train(steps=100_000, batch_size=64, loss_chunks=16, evaluate_every=2000),
)
