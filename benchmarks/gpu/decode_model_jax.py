"""Measured program: OLMoE-1B-7B with random weights, generating greedily, in bfloat16 and int8.

Timed is `moe.decode.Engine` as `generate.py` uses it: prompts into a cache of bfloat16, then tokens, all of a
sequence's by one call. A single request is timed from its tokens to the last of its new ones, on the host.

See `cases.py` for how it is run.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.gpu.cases import Record, serve_cases
from benchmarks.gpu.decode_shapes import FORMATS, NEW, PROMPT, REQUESTED
from benchmarks.worker import ROOT, Task
from moe.compress.speed import Workload, speed_of
from moe.config import load_config
from moe.decode import Decoder, Engine, Request, Sampling
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from moe.nn import MoEConfig
from moe.nn.quantized import quantize_params
from moe.quant import format_named
from moe.training.state import initial_state

CONFIG = Path("configs/olmoe_1b_7b.py")


def start(task: Task):
    """Versions, and what measures a case."""
    jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    config = load_config(str(ROOT / CONFIG), Experiment)[0].model
    if task["quick"]:
        small = MoEConfig(num_experts=8, expert_width=64, routing=config.moe.routing)
        config = replace(config, layers="MM", width=64, vocab_size=512, moe=small)
    state = initial_state(config, optax.identity(), seed=0, average=False)
    rounded = quantize_params(state.params, format_named("int8"), config.dtype)
    # In compute precision, as `Decoder` would cast them again and again.
    weights = dict(zip(FORMATS, (state.params, rounded), strict=True))
    decoders = {name: Decoder.of(config, params, state.controllers) for name, params in weights.items()}

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        told = {"format": case["format"]}
        if "requests" in case:
            yield {"kind": "request"} | told | one_by_one(decoders[case["format"]], case["requests"])
            return
        speed = speed_of([decoders[case["format"]]], case["batch"], Workload(PROMPT, NEW))
        figures = {"prefill": speed.prefill[0], "decode": speed.decode[0]}
        yield {"kind": "model", "batch": case["batch"]} | told | figures

    return {"versions": {"jax": jax.__version__}, "device": jax.devices()[0].device_kind}, measure


def one_by_one(decoder: Decoder, requests: int) -> Record:
    """Milliseconds of each request."""
    vocabulary, random = decoder.config.vocab_size, np.random.default_rng(0)
    engine = Engine(
        decoder,
        vocabulary=vocabulary,
        slots=1,
        length=PROMPT + REQUESTED,
        cache="bfloat16",
        steps=REQUESTED - 1,  # behind the first, which the prompt gives
    )
    engine.warm_up([PROMPT])
    taken = []
    for _ in range(requests):
        prompt = tuple(random.integers(0, vocabulary, PROMPT).tolist())
        began = time.perf_counter()
        engine.generate([Request(prompt, REQUESTED, Sampling(temperature=0.0))])
        taken.append(1e3 * (time.perf_counter() - began))
    return {"milliseconds": taken[1:]}


if __name__ == "__main__":
    serve_cases(start)
