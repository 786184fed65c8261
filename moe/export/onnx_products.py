"""How an ONNX model multiplies: by matrices in float32, or by quantised ones.

Codes and scales are those of `moe.quant`, so quality is what `eval.py --quantize` measures; the engine rounds
the other side of a product too, to eight bits in blocks. ONNX Runtime keeps codes as code + 2^(bits - 1), two
of four bits in a byte, the first in the low half, and wants a scale for each block of inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from moe.errors import UserError
from moe.export.onnx_graph import Graph
from moe.quant import Format, QuantizedMatrix, quantize

HEAD = Format("int8")  # of the output head under every format, as in `moe.nn.quantized`
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
INT8_ACTIVATIONS = 4  # ONNX Runtime's accuracy_level


def multiply(graph: Graph, x: str, name: str, w: Float[np.ndarray, "D F"], format: Format | None) -> str:
    """x @ w, in float32 or by a quantised matrix.

    Args:
        graph: to add it to.
        x: name of what is multiplied, [..., D].
        name: for the matrix.
        w: the matrix.
        format: of its codes; None leaves it float32.

    Raises:
        UserError: the format does not fit its number of inputs.
    """
    if format is None:
        return graph.add("MatMul", x, graph.array(name, w))
    inputs, outputs = w.shape
    block = common_block(format, inputs)
    codes, scales = _stored(_quantized(w, format), block)
    return graph.add(
        "MatMulNBits",
        x,
        graph.array(f"{name}.codes", codes.reshape(outputs, inputs // block, -1)),
        graph.array(f"{name}.scales", scales),
        K=inputs,
        N=outputs,
        bits=format.bits,
        block_size=block,
        accuracy_level=INT8_ACTIVATIONS,
    )


def experts(
    graph: Graph,
    x: str,
    logits: str,
    name: str,
    weights: tuple[Float[np.ndarray, "E D F"], Float[np.ndarray, "E D F"], Float[np.ndarray, "E F D"]],
    k: int,
    format: Format | None,
) -> str:
    """SwiGLU experts, weighted by the softmax over a token's k largest logits.

    Args:
        graph: to add it to.
        x: name of the tokens, [B, S, D].
        logits: name of [B S, E].
        name: for the matrices.
        weights: gate, up and down.
        k: experts of a token.
        format: of the codes; None leaves them float32.

    Raises:
        UserError: the format does not fit their number of inputs.
    """
    gate, up, down = weights
    # Dividing by the sum is left on: ONNX Runtime 1.31 errs without it inside a whole graph.
    attributes = {"k": k, "normalize_routing_weights": 1, "activation_type": "swiglu", "swiglu_fusion": 1}
    attributes |= {"activation_alpha": 1.0, "activation_beta": 0.0}
    inward, outward = f"{name}.gate_up", f"{name}.down"
    if format is None:
        w_in = graph.array(inward, _alternating(gate.swapaxes(1, 2), up.swapaxes(1, 2)))
        w_out = graph.array(outward, down.swapaxes(1, 2))
        return graph.add("MoE", x, logits, w_in, "", w_out, **attributes)
    block = common_block(format, gate.shape[1], down.shape[1])
    parts = [_stored(_quantized(w, format), block) for w in weights]
    both = [_alternating(*pair) for pair in zip(*parts[:2], strict=True)]
    matrices = [
        graph.array(f"{where}.{what}", array)
        for where, arrays in ((inward, both), (outward, parts[2]))
        for what, array in zip(("codes", "scales"), arrays, strict=True)
    ]
    attributes |= {"expert_weight_bits": format.bits, "block_size": block}
    attributes |= {"accuracy_level": INT8_ACTIVATIONS}
    return graph.add("QMoE", x, logits, *matrices[:2], "", *matrices[2:], **attributes)


def common_block(format: Format, *inputs: int) -> int:
    """Inputs that share a scale in the file: a group, or the longest blocks into which all matrices divide.

    Raises:
        UserError: there are none that ONNX Runtime knows.
    """
    block = format.group_size or LARGEST_BLOCK
    while not format.group_size and block > SMALLEST_BLOCK and any(n % block for n in inputs):
        block //= 2
    if block < SMALLEST_BLOCK or block & (block - 1) or any(n % block for n in inputs):
        sizes = " and ".join(map(str, sorted(set(inputs))))
        raise UserError(
            f"ONNX Runtime has scales for blocks of 16, 32, 64 ... inputs; {sizes} inputs of a matrix do not "
            f"divide into {block}"
        )
    return block


def _quantized(w: Float[np.ndarray, "*n D F"], format: Format) -> QuantizedMatrix:
    return jax.jit(quantize, static_argnums=1)(jnp.asarray(w), format)


def _stored(
    w: QuantizedMatrix, block: int
) -> tuple[UInt8[np.ndarray, "*n F d"], Float[np.ndarray, "*n F g"]]:
    """Codes as ONNX Runtime packs them, and a scale for each block."""
    codes = (np.asarray(w.codes()).astype(np.int16) + 2 ** (w.format.bits - 1)).astype(np.uint8)
    if w.format.bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    scales = np.asarray(w.scales.astype(jnp.float32))
    return codes, np.repeat(scales, w.shape[-2] // block // scales.shape[-1], axis=-1)


def _alternating(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[E, F, D] twice -> [E, 2 F, D]: row by row one of the first and one of the second."""
    return np.stack([a, b], axis=2).reshape(a.shape[0], -1, a.shape[2])
