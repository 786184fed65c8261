"""Measured program: `moe.decode` generating greedily. See `benchmarks/serving_cpu.py`."""

from dataclasses import replace
from typing import Any

import jax

from benchmarks.serving.model import LENGTH, MODEL, Weights
from benchmarks.serving.turns import prompt, work_of
from benchmarks.worker import serve
from moe.decode import Decoder, Engine, Request, Sampling
from moe.export.assemble import assemble
from moe.mesh import MeshConfig, make_mesh
from moe.nn.quantized import quantize_params
from moe.quant import format_named


def start(task: dict[str, Any]):
    """Versions, and the work."""
    jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    precision = task["precision"]
    plain = precision in ("float32", "bfloat16")
    model = replace(MODEL, compute_dtype=precision if plain else "bfloat16")
    _, params, rest = assemble(model, Weights().read)
    if not plain:
        params = quantize_params(params, format_named(precision), model.dtype)
    engine = Engine(
        Decoder.of(model, params, rest),
        vocabulary=model.vocab_size,
        slots=1,
        length=LENGTH,
        cache="float32" if precision == "float32" else "bfloat16",
        steps=task["new"],
    )
    tokens, going = tuple(prompt(task)), []
    engine.warm_up([len(tokens)])

    def read():
        engine.submit(Request(tokens, 1 + task["new"], Sampling(temperature=0.0)))
        going[:] = [engine.run()]
        next(going[0])

    def make() -> list[int]:
        return [token for made in going[0] for token in made.tokens]

    return {"versions": {"jax": jax.__version__}}, work_of(read, make)


if __name__ == "__main__":
    serve(start)
