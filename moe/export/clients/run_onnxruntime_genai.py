"""Loads an ONNX export in onnxruntime-genai and answers prompts; runs where that is, without our packages.

python run_onnxruntime_genai.py FOLDER ASKED.npz ANSWERED.npz
"""

import sys

import numpy as np
import onnxruntime_genai as genai


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def answer(folder: str, prompts: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of every token at every place of the prompts, and their greedy continuation."""
    model = genai.Model(folder)
    length = prompts.shape[1] + new_tokens
    asked = genai.GeneratorParams(model)
    asked.set_search_options(max_length=length, do_sample=False)
    found, greedy = [], []
    for prompt in prompts:
        tokens, said = prompt.astype(np.int32), None
        # The end of a text ends a generator; the next one goes on behind it.
        while len(tokens) < length:
            generator = genai.Generator(model, asked)
            generator.append_tokens(tokens)
            said = log_softmax(generator.get_output("logits")[0]) if said is None else said
            while not generator.is_done():
                generator.generate_next_token()
            tokens = generator.get_sequence(0)
        found.append(said)
        greedy.append(tokens[prompts.shape[1] :])
    return {"log_probabilities": np.stack(found), "greedy": np.stack(greedy)}


def main() -> None:
    """Read the prompts, answer, write."""
    folder, asked, answered = sys.argv[1:]
    questions = np.load(asked)
    np.savez(answered, **answer(folder, questions["prompts"], int(questions["new_tokens"])))


if __name__ == "__main__":
    main()
