"""Measured program: SonicMoE's layer (2512.14080), whose kernels its own tuner has chosen.

See `benchmarks/gpu/cases.py` for how it is run, and `benchmarks/README.md` for how its packages and tuning
results come to a machine.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from sonicmoe import KernelBackendMoE, MoE
from sonicmoe.enums import ActivationType
from sonicmoe.functional import TC_Softmax_Topk_Router_Function

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
        yield from measure_layer(layer(shape), shape, task["rounds"])

    return {"versions": {"torch": torch.__version__, "sonic-moe": version("sonic-moe")}}, measure


def layer(shape: LayerShape) -> TorchLayer:
    """The layer with its numbers."""
    with torch.device(DEVICE):
        module = MoE(
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
            hidden_size=shape.width,
            intermediate_size=shape.expert_width,
            activation_function=ActivationType.SWIGLU,
            add_bias=False,
            std=0.02,
        ).bfloat16()

    def chosen(x: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(x, module.router.weight)
        over_topk, renormalized = True, False
        route = TC_Softmax_Topk_Router_Function.apply
        return route(logits, shape.experts, shape.k, over_topk, renormalized)[1].long()

    return TorchLayer(
        infer=lambda x: module(x, KernelBackendMoE.sonicmoe, True)[0],
        train=lambda x: module(x, KernelBackendMoE.sonicmoe, False)[0],
        chosen=chosen,
        router=module.router.weight,
        inward=module.c_fc.weight,
        outward=module.c_proj.weight,
        gate=slice(None, None, 2),
        up=slice(1, None, 2),
    )


if __name__ == "__main__":
    serve_cases(start)
