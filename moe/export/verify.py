"""Whether an export says the same as the run: log-probabilities and greedy tokens, in float32.

The client runs in a process of its own, by an interpreter that may be another than ours.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.dispatch import Dropless
from moe.errors import UserError, one_line
from moe.export.assemble import ReadWeights, assemble
from moe.nn import TransformerConfig

CLIENTS = Path(__file__).parent / "clients"
TOLERANCE = 1e-5
"""Largest difference of two log-probabilities in float32."""
LOSS_TOLERANCE = 0.02
"""Largest difference of the mean loss (nats a token) where precision is lower."""


@dataclass(frozen=True)
class Answer:
    """What a model says to some prompts."""

    log_probabilities: Float[np.ndarray, "B S V"]
    """Of every token at every place."""

    greedy: Int[np.ndarray, "B N"]
    """The likeliest continuation, token after token."""


@dataclass(frozen=True)
class Comparison:
    """How two answers differ."""

    text: float
    """Largest difference of the log-probability of a token of the prompts (nats)."""

    vocabulary: float
    """The same over the whole vocabulary, relative where a log-probability is below -1."""

    loss: float
    """Theirs on the prompts less ours (nats a token)."""

    same_greedy: float
    """Share of the continuations that are the same to the last token."""

    places: int
    """Places of the prompts at which they were compared."""

    @property
    def exact(self) -> bool:
        """Whether they are the same up to the rounding of float32."""
        return max(self.text, self.vocabulary) <= TOLERANCE and self.same_greedy == 1.0

    @property
    def close(self) -> bool:
        """Whether they are as good as each other: for weights or activations of lower precision."""
        return abs(self.loss) <= LOSS_TOLERANCE

    def __str__(self) -> str:
        return (
            f"log-probabilities of {self.places} tokens differ by {self.text:.1e} at most, those of the "
            f"whole vocabulary by {self.vocabulary:.1e}, the mean loss by {self.loss:+.1e}; "
            f"{self.same_greedy:.0%} of greedy texts are the same"
        )


def compare(prompts: Int[np.ndarray, "B S"], ours: Answer, theirs: Answer) -> Comparison:
    """Two answers to the same prompts."""
    difference = ours.log_probabilities - theirs.log_probabilities
    text = np.take_along_axis(difference[:, :-1], prompts[:, 1:, None], axis=-1)
    relative = np.abs(difference) / np.maximum(1.0, np.abs(ours.log_probabilities))
    same = (ours.greedy == theirs.greedy).all(axis=1).mean()
    return Comparison(
        text=float(np.abs(text).max()),
        vocabulary=float(relative.max()),
        loss=float(text.mean()),
        same_greedy=float(same),
        places=text.size,
    )


def our_answer(
    model: TransformerConfig, read: ReadWeights, prompts: Int[np.ndarray, "B S"], new_tokens: int
) -> Answer:
    """What the run's model says, computed in float32 on the mesh that is set.

    Args:
        model: of the run.
        read: its weights.
        prompts: token ids; B must divide among the devices.
        new_tokens: length of the continuations.
    """
    plain = replace(model, compute_dtype="float32", moe=replace(model.moe, dispatch=Dropless()))
    graph, params, rest = assemble(plain, read)

    @jax.jit
    def log_probabilities(params, rest, tokens) -> Float[Array, "B S V"]:
        transformer = nnx.merge(graph, params, rest)
        return jax.nn.log_softmax(transformer.logits(transformer(tokens)[0]), axis=-1)

    # What comes later changes nothing before it, so one program serves all lengths.
    rows, length = prompts.shape
    tokens = np.zeros((rows, length + new_tokens), np.int32)
    tokens[:, :length] = prompts
    first = None
    for place in range(length, length + new_tokens):
        found = np.asarray(log_probabilities(params, rest, jnp.asarray(tokens)))
        first = found[:, :length] if first is None else first
        tokens[:, place] = found[:, place - 1].argmax(-1)
    assert first is not None
    return Answer(first, tokens[:, length:])


def client_answer(
    client: str, python: Path, export: Path, prompts: Int[np.ndarray, "B S"], new_tokens: int
) -> Answer:
    """What a client says that has loaded an export.

    Args:
        client: the name of a file in `moe/export/clients`.
        python: an interpreter that has what it needs.
        export: the file or folder that it loads.
        prompts: token ids.
        new_tokens: length of the continuations.

    Raises:
        UserError: it failed.
    """
    found = _asked(client, python, export, prompts=prompts, new_tokens=np.array(new_tokens))
    return Answer(found["log_probabilities"], found["greedy"])


def client_losses(
    client: str, python: Path, export: Path, texts: Int[np.ndarray, "N S+1"]
) -> Float[np.ndarray, "N S"]:
    """Negative log-likelihoods of the tokens of some texts, but for the first; see `client_answer`."""
    return _asked(client, python, export, texts=texts)["losses"]


def _asked(client: str, python: Path, export: Path, **questions: np.ndarray) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.npz", Path(folder) / "answered.npz"
        np.savez(asked, allow_pickle=False, **questions)
        # A client must not find our packages by accident, nor look for models on a network.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [python, CLIENTS / f"{client}.py", export, asked, answered]
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        if ended.returncode:
            raise UserError(f"{export} cannot be run by {client}: {_reason(ended.stdout)}")
        with np.load(answered) as found:
            return dict(found)


def _reason(output: str) -> str:
    """The first error that a failed program speaks of, from which others follow; else its last line."""
    found = re.findall(r"\b\w+Error: .*", output) or output.strip().splitlines()[-1:] or ["no message"]
    return one_line(found[0])
