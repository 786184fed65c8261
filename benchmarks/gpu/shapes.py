"""What the GPU benchmarks measure: shapes of known models, and how evenly their experts are used.

NumPy only: every measured program imports this file, in its own environment, and makes the same of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

LayerName = Literal["olmoe", "qwen3", "mixtral", "fine-grained"]
MatmulName = LayerName | Literal["qwen3-next"]

ROUTINGS = ("uniform", "Zipf")


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer with SwiGLU experts."""

    name: str
    tokens: int
    width: int
    expert_width: int
    experts: int
    k: int

    @property
    def assignments(self) -> int:
        """Rows of all experts together."""
        return self.tokens * self.k

    def flops(self, *, backward: bool) -> int:
        """Useful operations of the experts' products: 6 T K d f forward, three times that with backward."""
        forward = 6 * self.assignments * self.width * self.expert_width
        return 3 * forward if backward else forward

    def shrunk(self) -> "LayerShape":
        """The same few experts wide, for a trial on any machine."""
        experts = min(self.experts, 8)
        return replace(self, tokens=256, width=64, expert_width=32, experts=experts, k=min(self.k, 2))


@dataclass(frozen=True)
class MatmulShape:
    """Rows of several experts, each row times the matrix of its expert: [A, inner] x [E, inner, outer]."""

    name: str
    layer: LayerShape
    inner: int
    outer: int

    @property
    def rows(self) -> int:
        """A, all experts' rows."""
        return self.layer.assignments

    @property
    def experts(self) -> int:
        """E."""
        return self.layer.experts

    def flops(self) -> int:
        """Operations of the product, and of each of its two gradients."""
        return 2 * self.rows * self.inner * self.outer


OLMOE = LayerShape("OLMoE", 32768, 2048, 1024, 64, 8)  # 2409.02060
QWEN3 = LayerShape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8)  # 2505.09388
MIXTRAL = LayerShape("Mixtral 8x7B", 8192, 4096, 14336, 8, 2)  # 2401.04088
FINE_GRAINED = LayerShape("fine-grained 7B", 24576, 1536, 256, 128, 8)  # 2512.14080
QWEN3_NEXT = LayerShape("Qwen3-Next-80B-A3B", 32768, 2048, 512, 512, 10)

LAYERS: dict[LayerName, LayerShape] = {
    "olmoe": OLMOE,
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "fine-grained": FINE_GRAINED,
}
MATMULS: dict[MatmulName, LayerShape] = {**LAYERS, "qwen3-next": QWEN3_NEXT}


def projections(layers: Iterable[MatmulName]) -> list[dict[str, Any]]:
    """Cases of the two products of each layer: up, gate and up matrix side by side, and down."""
    sides = ("up", "down")
    return [
        {"name": f"{MATMULS[at].name} {side}", "layer": at, "side": side} for at in layers for side in sides
    ]


def projection(case: dict[str, Any], *, quick: bool) -> MatmulShape:
    """The product of a case."""
    layer = MATMULS[case["layer"]]
    layer = layer.shrunk() if quick else layer
    inner, outer = layer.width, 2 * layer.expert_width
    if case["side"] == "down":
        inner, outer = layer.expert_width, layer.width
    return MatmulShape(case["name"], layer, inner, outer)


def shares(layer: LayerShape, routing: str) -> np.ndarray:
    """Part of the tokens that choose each expert, [E], at most one; they sum to K.

    "Zipf" gives the i-th most used expert a part proportional to 1 / i. A token chooses an expert only once,
    so what goes beyond all tokens is spread over the others in the same proportions. Which expert is used
    how much is drawn at random, always the same.
    """
    if routing == "uniform":
        return np.full(layer.experts, layer.k / layer.experts)
    wanted = 1 / np.arange(1, layer.experts + 1)
    share = wanted * layer.k / wanted.sum()
    while (share > 1 + 1e-12).any():
        full = share >= 1
        share = np.where(full, 1.0, wanted * (layer.k - full.sum()) / wanted[~full].sum())
    return np.random.default_rng(0).permutation(share)


def group_sizes(layer: LayerShape, routing: str) -> np.ndarray:
    """Rows of each expert, [E] int32; they sum to A."""
    exact = shares(layer, routing) * layer.tokens
    sizes = np.floor(exact + 1e-6).astype(np.int32)
    largest_rest = np.argsort(sizes - exact, kind="stable")[: layer.assignments - sizes.sum()]
    sizes[largest_rest] += 1
    return sizes


def router_bias(layer: LayerShape, routing: str, tokens: int = 8192, steps: int = 60) -> np.ndarray:
    """What to add to logits of standard normal noise so that top-k choices use experts as `shares` says.

    Found by following the shares that a sample of tokens gives; float32 [E], zeros for "uniform".
    """
    if routing == "uniform":
        return np.zeros(layer.experts, np.float32)
    noise = np.random.default_rng(1).standard_normal((tokens, layer.experts), np.float32)
    target, bias = shares(layer, routing), np.zeros(layer.experts)
    for step in range(steps):
        chosen = np.argpartition(noise + bias, -layer.k, axis=1)[:, -layer.k :]
        share = np.bincount(chosen.reshape(-1), minlength=layer.experts) / tokens
        bias += (0.97**step) * (_logit(target, tokens) - _logit(share, tokens)) / 2
    return bias.astype(np.float32)


def _logit(share: np.ndarray, tokens: int) -> np.ndarray:
    inside = np.clip(share, 0.5 / tokens, 1 - 0.5 / tokens)
    return np.log(inside / (1 - inside))
