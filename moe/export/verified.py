"""Which clients load what was written, and whether each that is installed says what the run says."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from moe.data import Dataset
from moe.errors import UserError
from moe.export.assemble import ReadWeights
from moe.export.verify import client_answer, compare, our_answer
from moe.nn import TransformerConfig

PEERS = Path(__file__).parents[2] / ".peers"
PROMPT_TOKENS, NEW_TOKENS = 64, 16  # of each prompt


@dataclass(frozen=True)
class Client:
    """What loads exports, in a process of its own."""

    package: str
    """That its interpreter has."""

    script: str
    """The file in `moe/export/clients` that runs it."""

    rounds: bool = True
    """Whether it computes more coarsely where weights are of lower precision."""

    environment: str = ""
    """The peers' environment that holds it; empty where that is called as the package is."""

    @property
    def installing(self) -> str:
        """The command that installs it."""
        return f"uv run python -m benchmarks.peers.environment {self.environment or self.package}"

    def python(self, given: str = "") -> Path | None:
        """An interpreter that has it: the one given, else this one or that of its own environment."""
        if given:
            finds = f"import importlib.util as i, sys; sys.exit(not i.find_spec({self.package!r}))"
            return Path(given) if subprocess.run([given, "-c", finds]).returncode == 0 else None
        if importlib.util.find_spec(self.package):
            return Path(sys.executable)
        python = PEERS / (self.environment or self.package) / "bin" / "python"
        return python if python.exists() else None


TRANSFORMERS = Client("transformers", "run_transformers", rounds=False)
LLAMA_CPP = Client("llama_cpp", "run_llama_cpp")
CLIENTS = {
    "hf": (TRANSFORMERS, Client("vllm", "run_vllm")),
    "gguf": (LLAMA_CPP,),
    "onnx": (
        Client("onnxruntime", "run_onnxruntime"),
        Client("onnxruntime_genai", "run_onnxruntime_genai", environment="onnxruntime"),
    ),
    "stablehlo": (Client("jax", "run_stablehlo"),),
}


def verify(
    export: Path,
    clients: tuple[Client, ...],
    model: TransformerConfig,
    read: ReadWeights,
    prompts: Int[np.ndarray, "B S"],
    *,
    whole: bool,
    python: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Compare what each installed client says with what the run's model says; a line for each.

    Args:
        export: the file or folder that was written.
        clients: that load it.
        model: of the run.
        read: weights to compare with.
        prompts: token ids; B must divide among the devices.
        whole: whether the weights are float32, so that even a client that would round has nothing to round.
        python: an interpreter to look for clients in, instead of where they usually are.
        say: what the lines go to.

    Raises:
        UserError: a client says something else, or none can say anything.
    """
    ours, verified = None, False
    for client in clients:
        interpreter = client.python(python)
        if interpreter is None:
            say(f"not verified in {client.package}, which is not installed: {client.installing}")
            continue
        ours = ours or our_answer(model, read, prompts, NEW_TOKENS)
        try:
            theirs = client_answer(client.script, interpreter, export, prompts, NEW_TOKENS)
        except UserError as error:  # an engine need not run on this machine, nor have what this model needs
            say(f"not verified in {client.package}: {error}")
            continue
        found = compare(prompts, ours, theirs)
        if not (found.exact if whole or not client.rounds else found.close):
            raise UserError(
                f"{export} in {client.package}: {found}; see docs/export.md for what may explain it"
            )
        verified = True
        say(f"verified in {client.package}: {found}")
    if not verified:
        raise UserError(
            f"--verify found no client that runs {export}: install one as said above, or name an interpreter "
            "that has one with --python"
        )


def validation_prompts(dataset: Dataset, length: int) -> Int[np.ndarray, "B S"]:
    """The beginning of each slice's validation data, as many rows as the devices share.

    With what continues them they are no longer than the run's sequences, for which engines make room.

    Args:
        dataset: the prepared text.
        length: of the run's sequences.
    """
    width = min(PROMPT_TOKENS, max(1, length - NEW_TOKENS))
    rows = [dataset.tokens(name, "validation")[:width] for name in dataset.slices]
    rows *= -(-jax.device_count() // len(rows))
    usable = len(rows) - len(rows) % jax.device_count()
    return np.stack(rows[:usable]).astype(np.int32)
