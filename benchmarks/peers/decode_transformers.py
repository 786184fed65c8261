"""Measured program: OLMoE-1B-7B of transformers with random bfloat16 weights, generating greedily.

`generate` with a static cache, which transformers compiles, and `grouped_mm` experts. Of a prompt read and of
the tokens behind the first, as ours are timed.

See `benchmarks/gpu/cases.py` for how it is run.
"""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.gpu.cases import Record, serve_cases
from benchmarks.gpu.decode_shapes import NEW, PROMPT
from benchmarks.peers.torch_device import DEVICE
from benchmarks.worker import Task


def start(task: Task):
    """Versions, and what measures a case."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 8}
    config = transformers.OlmoeConfig(**(sizes if task["quick"] else {}))  # the published model's by default
    config._experts_implementation = "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = transformers.OlmoeForCausalLM(config).eval()

    def seconds(tokens, new: int) -> float:
        began = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        batch = case["batch"]
        tokens = torch.randint(0, config.vocab_size, (batch, PROMPT), device=DEVICE)
        seconds(tokens, 1), seconds(tokens, 1 + NEW)
        pairs = [(seconds(tokens, 1), seconds(tokens, 1 + NEW)) for _ in range(task["rounds"])]
        yield {
            "kind": "model",
            "format": "bfloat16",
            "batch": batch,
            "prefill": batch * PROMPT / median(read for read, _ in pairs),
            "decode": batch * NEW / median(all_of_it - read for read, all_of_it in pairs),
        }

    return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}, measure


if __name__ == "__main__":
    serve_cases(start)
