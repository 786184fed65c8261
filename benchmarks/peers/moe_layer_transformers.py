"""Measured program: the MoE block of Qwen3-MoE in Hugging Face transformers, with its `grouped_mm` experts.

See `benchmarks/gpu/cases.py` for how it is run.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.gpu.cases import Record, serve_cases
from benchmarks.gpu.shapes import LAYERS, LayerShape
from benchmarks.peers.moe_layer_torch import TorchLayer, measure_layer
from benchmarks.peers.torch_device import DEVICE
from benchmarks.worker import Task


def start(task: Task):
    """Versions, and what measures a case."""
    torch.manual_seed(0)

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        shape = LAYERS[case["layer"]]
        shape = shape.shrunk() if task["quick"] else shape
        yield from measure_layer(layer(shape, compiled=task["compiled"]), shape, task["rounds"])

    return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}, measure


def layer(shape: LayerShape, *, compiled: bool) -> TorchLayer:
    """The block with its numbers."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.expert_width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(DEVICE):
        block = Qwen3MoeSparseMoeBlock(config).bfloat16()
    apply = torch.compile(block) if compiled else block
    return TorchLayer(
        infer=lambda x: apply(x[None])[0],
        train=lambda x: apply(x[None])[0],
        chosen=lambda x: block.gate(x)[2],
        router=block.gate.weight,
        inward=block.experts.gate_up_proj,
        outward=block.experts.down_proj,
        gate=slice(None, shape.expert_width),
        up=slice(shape.expert_width, None),
    )


if __name__ == "__main__":
    serve_cases(start)
