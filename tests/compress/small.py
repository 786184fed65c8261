"""A small model, dense and with experts of two widths, and text for it."""

from dataclasses import replace

import jax
import numpy as np
from meshes import MESHES

from moe.compress.visits import Visits
from moe.dispatch import Dropless
from moe.mesh import MeshConfig, make_mesh
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, build
from moe.routing import TopK
from moe.training.state import split

CONFIG = TransformerConfig(
    vocab_size=24,
    width=16,
    layers="DMM",
    dense_width=16,
    attention=AttentionConfig(heads=2, kv_heads=1, head_width=8),
    moe=MoEConfig(
        num_experts=4, expert_width=(8, 8, 16, 16), routing=TopK(k=2), balance=(), dispatch=Dropless(tile=4)
    ),
    compute_dtype="float32",
)
VISITED = replace(CONFIG, moe=replace(CONFIG.moe, dispatch=Visits(of=CONFIG.moe.dispatch)))

TOKENS = np.random.default_rng(0).integers(0, 24, (8, 13)).astype(np.int32)
WEIGHT = np.ones((8, 12), np.float32)
WEIGHT[7] = 0  # a row that only fills the batch
BATCHES = [{"tokens": TOKENS, "weight": WEIGHT}]


def on(mesh: str):
    """Context in which the mesh of that name is set."""
    fsdp, expert = MESHES[mesh]
    return jax.set_mesh(make_mesh(MeshConfig(fsdp=fsdp, expert=expert), jax.devices()[: fsdp * expert]))


def placed(config=CONFIG):
    """Structure, parameters and controllers, on the mesh that is set."""
    return split(build(config, jax.random.key(0)))
