"""Loads a checkpoint in transformers and answers prompts; runs where transformers is, without our packages.

python run_transformers.py CHECKPOINT ASKED.npz ANSWERED.npz
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def answer(checkpoint: str, prompts: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of every token at every place of the prompts, and their greedy continuation."""
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            sys.exit(f"{what}: {sorted(info[what])[:3]}")
    tokens = torch.tensor(prompts, dtype=torch.long)
    with torch.inference_mode():
        log_probabilities = torch.log_softmax(model.eval()(tokens).logits, dim=-1)
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=-1,  # none: continue through the end of a text
        )
    greedy = whole[:, tokens.shape[1] :]
    return {"log_probabilities": log_probabilities.numpy(), "greedy": greedy.numpy()}


def main() -> None:
    """Read the prompts, answer, write."""
    checkpoint, asked, answered = sys.argv[1:]
    questions = np.load(asked)
    np.savez(answered, **answer(checkpoint, questions["prompts"], int(questions["new_tokens"])))


if __name__ == "__main__":
    main()
