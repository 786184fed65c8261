"""Measured program: llama.cpp generating greedily from a GGUF file. See `benchmarks/serving_cpu.py`.

Tokens are fed one by one through its own C functions; nothing but the largest logit is looked for.
"""

from typing import Any

import llama_cpp
import numpy as np

from benchmarks.serving.turns import prompt, work_of
from benchmarks.worker import serve


def start(task: dict[str, Any]):
    """Versions, and the work."""
    threads, length = task["threads"], task["prompt"] + task["new"] + 1
    model = llama_cpp.Llama(
        task["path"], n_ctx=length, n_batch=length, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    tokens, made = prompt(task), []

    def likeliest() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (task["vocabulary"],)).argmax())

    def read():
        model.reset()
        model.eval(tokens)
        made[:] = [likeliest()]

    def make() -> list[int]:
        for _ in range(task["new"]):
            model.eval(made[-1:])
            made.append(likeliest())
        return made

    told = llama_cpp.llama_print_system_info().decode().strip()
    return {"versions": {"llama-cpp-python": llama_cpp.__version__}, "build": told}, work_of(read, make)


if __name__ == "__main__":
    serve(start)
