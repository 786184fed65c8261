"""How each engine is started on an export, and what is known of it there."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Engine:
    """One thing that serves models."""

    name: str
    """What it is called."""

    command: str
    """How it is started; {path} is the export."""

    tested: str
    """What the project's tests do with it."""


UNTESTED = "not tested here"

# In these versions log-probabilities and greedy tokens are compared for every architecture by tests/export.
HUGGING_FACE = (
    Engine(
        "transformers", "transformers chat {path}", "tested with 5.23: the same log-probabilities and tokens"
    ),
    Engine("vLLM", "vllm serve {path}", UNTESTED),
    Engine("SGLang", "python -m sglang.launch_server --model-path {path}", UNTESTED),
    Engine("TensorRT-LLM", "trtllm-serve {path}", UNTESTED),
)

GGUF = (
    Engine("llama.cpp", "llama-server -m {path}", "tested with 0.3.36 of llama-cpp-python"),
    Engine("Ollama", "ollama create NAME -f Modelfile, which says FROM {path}", UNTESTED),
)

STABLEHLO = (
    Engine(
        "JAX", "python moe/export/clients/run_stablehlo.py {path} ASKED.npz ANSWERED.npz", "tested on a CPU"
    ),
)


def told(engines: tuple[Engine, ...], path: Path) -> list[str]:
    """A line for each engine: its name, the command, what was tested."""
    width = max(len(engine.name) for engine in engines)
    return [
        f"{engine.name:{width}}  {engine.command.format(path=path)}   ({engine.tested})" for engine in engines
    ]
