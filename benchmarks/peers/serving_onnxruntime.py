"""Measured program: onnxruntime-genai generating greedily. See `benchmarks/serving_cpu.py`."""

import json
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai as genai

from benchmarks.serving.turns import prompt, work_of
from benchmarks.worker import serve


def start(task: dict[str, Any]):
    """Versions, and the work."""
    config = genai.Config(task["path"])
    options = {"intra_op_num_threads": task["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)
    asked = genai.GeneratorParams(model)
    whole = task["prompt"] + task["new"] + 1
    # The end of a text would end a turn early; random weights say it as seldom as any other token.
    asked.set_search_options(max_length=whole, min_length=whole, do_sample=False)
    tokens, generator = np.array(prompt(task), np.int32), []

    def read():
        generator[:] = [genai.Generator(model, asked)]
        generator[0].append_tokens(tokens)
        generator[0].generate_next_token()

    def make() -> list[int]:
        for _ in range(task["new"]):
            generator[0].generate_next_token()
        return generator[0].get_sequence(0)[task["prompt"] :].tolist()

    versions = {"onnxruntime": onnxruntime.__version__, "onnxruntime-genai": genai.__version__}
    return {"versions": versions}, work_of(read, make)


if __name__ == "__main__":
    serve(start)
