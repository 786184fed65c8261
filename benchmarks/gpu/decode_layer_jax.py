"""Measured program: the experts of decode steps and of a prompt, in bfloat16, int8, and int8 with int8 rows.

Timed is a dispatch with its experts, as a layer calls it: the plan, the gather, the products, the combine;
the choice of experts is given. Steps follow one another in one program, each with experts of its own choice,
so that few are found in the L2 cache. Matrices are random numbers of the format.

See `cases.py` for how it is run.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import Record, attempt, serve_cases
from benchmarks.gpu.decode_shapes import DECODED, TOKENS, choices, touched_bytes
from benchmarks.gpu.grouped_matmul_jax import normal
from benchmarks.gpu.shapes import LayerShape
from benchmarks.gpu.timing import seconds_of_rounds
from benchmarks.worker import Task
from moe.dispatch import Dispatch, Dropless
from moe.dispatch.touched import Touched
from moe.mesh import MeshConfig, make_mesh, spec
from moe.nn.feed_forward import SWIGLU_EXPERTS
from moe.quant import QuantizedMatrix, format_named
from moe.routing import Routing

STEPS = 16  # in one program
Weights = dict[str, Any]


def start(task: Task):
    """Versions, and what measures a case."""
    jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        if case["kind"] == "copy":
            yield copy(2**20 if task["quick"] else 2**29, task["rounds"])
            return
        shape = DECODED[case["layer"]]
        shape = shape.shrunk() if task["quick"] else shape
        formats = ("", "int8") if case["kind"] == "decode" else ("", "int8-dynamic")
        for format in formats:
            yield from attempt(partial(of_format, case["kind"], shape, format, task["rounds"]), kind=format)

    return {"versions": {"jax": jax.__version__}, "device": jax.devices()[0].device_kind}, measure


def copy(numbers: int, rounds: int) -> Record:
    """Bytes read and written, and the time."""
    x = normal(0, (numbers,))
    run = jax.jit(lambda x: x + 1).lower(x).compile()
    seconds = seconds_of_rounds(partial(run, x), jax.block_until_ready, rounds)
    return {"kind": "copy", "bytes": 2 * x.nbytes, "seconds": seconds}


def of_format(kind: str, shape: LayerShape, format: str, rounds: int) -> Iterator[Record]:
    """Steps of every batch, or one prompt, with matrices of one format."""
    weights = drawn(shape, format)
    for tokens in TOKENS if kind == "decode" else (shape.tokens,):
        chosen = choices(shape, tokens, STEPS if kind == "decode" else 1)
        dispatch = Touched() if kind == "decode" else Dropless()
        x = jax.sharding.reshard(normal(1, (1, tokens, shape.width)), spec("batch"))
        run = jax.jit(partial(through, dispatch, shape)).lower(x, weights, jnp.asarray(chosen)).compile()
        call = partial(run, x, weights, jnp.asarray(chosen))
        yield {
            "kind": kind,
            "format": format or "bfloat16",
            "tokens": tokens,
            "steps": len(chosen),
            "bytes": touched_bytes(shape, chosen, 8 if format else 16),
            "flops": 6 * chosen.size * shape.width * shape.expert_width,
            "seconds": seconds_of_rounds(call, jax.block_until_ready, rounds),
        }


def through(dispatch: Dispatch, shape: LayerShape, x, weights: Weights, chosen):
    """A layer after the other, with the same matrices and other experts."""
    token = jnp.repeat(jnp.arange(x.shape[1], dtype=jnp.int32), shape.k)[None]
    weight = jnp.full(token.shape, 1 / shape.k)
    token, weight = jax.sharding.reshard((token, weight), spec("batch"))

    @jax.jit  # traced and lowered once, not for every step
    def layer(x, expert, weights):
        expert = jax.sharding.reshard(expert.reshape(1, -1), spec("batch"))
        routing = Routing(token, expert, weight, None, shape.k)
        y, *_ = dispatch(x, routing, weights, SWIGLU_EXPERTS, num_experts=shape.experts, keep_outputs=False)
        return x + y

    for expert in chosen:
        x = layer(x, expert, weights)
    return x


def drawn(shape: LayerShape, format: str) -> Weights:
    """Random matrices of a format, made as such: the largest ones would not fit in two at once."""
    e, d, f = shape.experts, shape.width, shape.expert_width
    shapes = {"w_gate": (e, d, f), "w_up": (e, d, f), "w_down": (e, f, d)}
    made = {name: matrices(seed, s, format) for seed, (name, s) in enumerate(shapes.items())}
    return jax.sharding.reshard(made, spec("expert"))


@partial(jax.jit, static_argnums=(1, 2))
def matrices(seed: int, shape: tuple[int, int, int], format: str):
    """Of deviation 1 / sqrt(inputs), normal, or in int8 uniform."""
    experts, inputs, outputs = shape
    if not format:
        return normal(seed, shape) * np.float32(inputs**-0.5).astype(jnp.bfloat16)
    codes = jax.random.randint(jax.random.key(seed), (experts, outputs, inputs), -127, 128, jnp.int8)
    scales = jnp.full((experts, outputs, 1), (3 / inputs) ** 0.5 / 127)
    return QuantizedMatrix(codes, scales, format_named(format))


if __name__ == "__main__":
    serve_cases(start)
