"""What `decode.py` generates with: layers of known models, batches, lengths. NumPy only, for peers' sake."""

import numpy as np

from benchmarks.gpu.shapes import LayerShape

DECODED = {
    "qwen3": LayerShape("Qwen3-30B-A3B", 4096, 2048, 768, 128, 8),  # 2505.09388
    "mixtral": LayerShape("Mixtral 8x7B", 4096, 4096, 14336, 8, 2),  # 2401.04088
    "deepseek": LayerShape("DeepSeek-V3", 4096, 7168, 2048, 256, 8),  # 2412.19437
}
TOKENS = (1, 8, 32, 128)  # of a decode step of a layer
BATCHES = (1, 64)  # of a whole model
FORMATS = ("bfloat16", "int8")  # of its weights
PROMPT, NEW = 512, 128  # tokens of a sequence of a whole model
REQUESTED = 32  # tokens that one request asks for


def choices(shape: LayerShape, tokens: int, steps: int) -> np.ndarray:
    """Experts of every token at every step, [steps, tokens, K].

    A token goes through all experts in an order of its own, K a step: a batch of one comes to no expert twice
    before it has been to all, tokens of a larger one meet by chance.
    """
    orders = [np.random.default_rng(token).permutation(shape.experts) for token in range(tokens)]
    at = np.arange(steps * shape.k).reshape(steps, 1, shape.k) % shape.experts
    return np.concatenate([order[at] for order in orders], axis=1).astype(np.int32)


def touched_bytes(shape: LayerShape, chosen: np.ndarray, bits: int) -> int:
    """Bytes of the matrices of all experts chosen, step by step; int8 ones with a float32 scale a column."""
    numbers = 3 * shape.width * shape.expert_width
    scales = 4 * (2 * shape.expert_width + shape.width) if bits == 8 else 0
    return sum(len(np.unique(step)) for step in chosen) * (numbers * bits // 8 + scales)
