"""Loads an ONNX export and answers prompts: their log-probabilities by ONNX Runtime, what follows by
onnxruntime-genai; runs where both are, without our packages.

python run_onnxruntime.py FOLDER ASKED.npz ANSWERED.npz
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_genai as genai


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def score(folder: Path, prompts: np.ndarray) -> np.ndarray:
    """Log-probabilities of every token at every place, in one pass."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    fed = {"input_ids": prompts.astype(np.int64), "attention_mask": np.ones(prompts.shape, np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            _, heads, _, width = value.shape
            fed[value.name] = np.zeros((len(prompts), heads, 0, width), np.float32)
    return log_softmax(session.run(["logits"], fed)[0])


def generate(folder: Path, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
    """The greedy continuation, through the end of a text."""
    model = genai.Model(str(folder))
    asked = genai.GeneratorParams(model)
    asked.set_search_options(max_length=prompts.shape[1] + new_tokens, do_sample=False)
    rows = []
    for prompt in prompts:
        tokens = prompt.astype(np.int32)
        # The end of a text ends a generator; the next one goes on behind it.
        while len(tokens) < prompts.shape[1] + new_tokens:
            generator = genai.Generator(model, asked)
            generator.append_tokens(tokens)
            while not generator.is_done():
                generator.generate_next_token()
            tokens = generator.get_sequence(0)
        rows.append(tokens[prompts.shape[1] :])
    return np.stack(rows)


def main() -> None:
    """Read the prompts, answer, write."""
    folder, asked, answered = map(Path, sys.argv[1:])
    questions = np.load(asked)
    prompts, new_tokens = questions["prompts"], int(questions["new_tokens"])
    found = {"log_probabilities": score(folder, prompts), "greedy": generate(folder, prompts, new_tokens)}
    np.savez(answered, **found)


if __name__ == "__main__":
    main()
