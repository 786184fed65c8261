"""Measured program: transformers generating greedily, without the overhead of its `generate`.

See `benchmarks/serving_cpu.py`.
"""

from typing import Any

import torch
import transformers

from benchmarks.serving.turns import prompt, work_of
from benchmarks.worker import serve


def start(task: dict[str, Any]):
    """Versions, and the work."""
    torch.set_num_threads(task["threads"])
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task["path"], dtype=getattr(torch, task["precision"]), experts_implementation="grouped_mm"
    ).eval()
    tokens, state, made = torch.tensor([prompt(task)]), {}, []

    def feed(tokens: torch.Tensor) -> None:
        found = model(tokens, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        made.append(int(found.logits[0, -1].argmax()))

    def read():
        state["cache"] = transformers.DynamicCache(config=model.config)
        made.clear()
        feed(tokens)

    def make() -> list[int]:
        for _ in range(task["new"]):
            feed(torch.tensor([made[-1:]]))
        return made

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": versions}, work_of(read, make)


if __name__ == "__main__":
    serve(start)
