"""Loads a GGUF file in llama.cpp and answers prompts; runs where llama-cpp-python is, without our packages.

python run_llama_cpp.py FILE.gguf ASKED.npz ANSWERED.npz
"""

import sys

import numpy as np
from llama_cpp import Llama

F32 = 0  # of ggml's types


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def answer(path: str, prompts: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of every token at every place of the prompts, and their greedy continuation."""
    model = load(path, prompts.shape[1] + new_tokens)
    found, greedy = [], []
    for prompt in prompts:
        model.reset()
        model.eval(prompt.tolist())
        found.append(log_softmax(model.scores[: len(prompt)]))
        greedy.append([])
        for _ in range(new_tokens):
            greedy[-1].append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(greedy[-1][-1:])
    return {"log_probabilities": np.stack(found), "greedy": np.array(greedy)}


def losses(path: str, texts: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every token but the first, [N, S]."""
    model, found = load(path, texts.shape[1] - 1), []
    for text in texts:
        model.reset()
        model.eval(text[:-1].tolist())
        said = log_softmax(model.scores[: len(text) - 1])
        found.append(-np.take_along_axis(said, text[1:, None], axis=-1)[:, 0])
    return np.stack(found)


def load(path: str, length: int) -> Llama:
    """The model, with room for so many tokens, and all in float32 that is not of the file's precision."""
    return Llama(
        path,
        n_ctx=length,
        n_batch=length,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )


def main() -> None:
    """Read the prompts, answer, write."""
    path, asked, answered = sys.argv[1:]
    questions = np.load(asked)
    if "texts" in questions:
        np.savez(answered, losses=losses(path, questions["texts"]))
    else:
        np.savez(answered, **answer(path, questions["prompts"], int(questions["new_tokens"])))


if __name__ == "__main__":
    main()
