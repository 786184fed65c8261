"""Loads a checkpoint in vLLM and answers prompts; runs where vllm is, without our packages.

python run_vllm.py CHECKPOINT ASKED.npz ANSWERED.npz
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm.platforms

CONFIG = json.loads((Path(sys.argv[1]) / "config.json").read_text())
QUANTIZED = "quantization_config" in CONFIG

if QUANTIZED:
    # The only kernels for quantised experts on a CPU are zentorch's. vLLM looks for them on AMD's processors
    # alone, and they run on others with AVX-512 too. Here, and not in `main`, for the engine's processes.
    vllm.platforms._is_amd_zen_cpu = lambda: True

from vllm import LLM, SamplingParams  # noqa: E402


def answer(checkpoint: str, prompts: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of every token at every place of the prompts, and their greedy continuation."""
    length = prompts.shape[1]
    asked = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        logprobs=-1,
        prompt_logprobs=-1,
        ignore_eos=True,
        detokenize=False,
    )
    found = generate(checkpoint, prompts, asked, longest=length + new_tokens)
    log_probabilities = np.full((*prompts.shape, CONFIG["vocab_size"]), -np.inf, np.float32)
    for row, one in enumerate(found):
        # Before the first token nothing is predicted; the last place is that of the first new token.
        places = [*one.prompt_logprobs[1:], one.outputs[0].logprobs[0]]
        for place, likely in enumerate(places):
            for token, said in likely.items():
                log_probabilities[row, place, token] = said.logprob
    return {
        "log_probabilities": log_probabilities,
        "greedy": np.array([one.outputs[0].token_ids for one in found]),
    }


def generate(checkpoint: str, prompts: np.ndarray, asked: SamplingParams, *, longest: int) -> list:
    """What vLLM returns; kernels for quantised weights compute in bfloat16."""
    engine = LLM(
        checkpoint,
        dtype="bfloat16" if QUANTIZED else "float32",
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=8,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    return engine.generate([{"prompt_token_ids": row.tolist()} for row in prompts], asked, use_tqdm=False)


def main() -> None:
    """Read the prompts, answer, write."""
    checkpoint, asked, answered = sys.argv[1:]
    questions = np.load(asked)
    np.savez(answered, **answer(checkpoint, questions["prompts"], int(questions["new_tokens"])))


if __name__ == "__main__":
    main()
