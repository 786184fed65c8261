"""Loads an ONNX export in ONNX Runtime and answers prompts; runs where onnxruntime is, without our packages.

python run_onnxruntime.py FOLDER ASKED.npz ANSWERED.npz
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def answer(folder: Path, prompts: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of every token at every place of the prompts, and their greedy continuation."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    cache = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            _, heads, _, width = value.shape
            cache[value.name] = np.zeros((len(prompts), heads, 0, width), np.float32)
    tokens, first, greedy = prompts.astype(np.int64), None, []
    for place in range(prompts.shape[1], prompts.shape[1] + new_tokens):
        mask = np.ones((len(prompts), place), np.int64)
        found = session.run(None, {"input_ids": tokens, "attention_mask": mask} | cache)
        said = dict(zip(outputs, found, strict=True))
        logits = said.pop("logits")
        cache = {name.replace("present", "past_key_values"): array for name, array in said.items()}
        first = log_softmax(logits) if first is None else first
        tokens = logits[:, -1:].argmax(-1)
        greedy.append(tokens[:, 0])
    return {"log_probabilities": first, "greedy": np.stack(greedy, axis=1)}


def main() -> None:
    """Read the prompts, answer, write."""
    folder, asked, answered = map(Path, sys.argv[1:])
    questions = np.load(asked)
    np.savez(answered, **answer(folder, questions["prompts"], int(questions["new_tokens"])))


if __name__ == "__main__":
    main()
