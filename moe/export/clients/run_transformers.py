"""Loads a checkpoint in transformers and answers prompts; runs where transformers is, without our packages.

python run_transformers.py CHECKPOINT ASKED.npz ANSWERED.npz

Of weights whose inputs are to be rounded too (W8A8), transformers cannot load experts. compressed-tensors
turns those into plain ones first, so that the answer is that of the weights alone.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

ROWS = 16  # texts at once


def answer(checkpoint: str, prompts: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of every token at every place of the prompts, and their greedy continuation."""
    model = load(Path(checkpoint))
    tokens = torch.tensor(prompts, dtype=torch.long)
    with torch.inference_mode():
        log_probabilities = torch.log_softmax(model(tokens).logits, dim=-1)
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=-1,  # none: continue through the end of a text
        )
    greedy = whole[:, tokens.shape[1] :]
    return {"log_probabilities": log_probabilities.numpy(), "greedy": greedy.numpy()}


def losses(checkpoint: str, texts: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every token but the first, [N, S]."""
    model, found = load(Path(checkpoint)), []
    with torch.inference_mode():
        for rows in torch.tensor(texts, dtype=torch.long).split(ROWS):
            logits = model(rows[:, :-1]).logits
            found.append(torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none"))
    return torch.cat(found).numpy()


def load(checkpoint: Path) -> PreTrainedModel:
    """The model in float32; ends the process where a weight is missing or superfluous."""
    config = json.loads((checkpoint / "config.json").read_text())
    quantization = config.get("quantization_config")
    if quantization and quantization["config_groups"]["group_0"]["input_activations"]:
        with tempfile.TemporaryDirectory() as folder:
            decompress(checkpoint, config, Path(folder))
            return load(Path(folder))
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            sys.exit(f"{what}: {sorted(info[what])[:3]}")
    return model.eval()


def decompress(checkpoint: Path, config: dict, folder: Path) -> None:
    """Write the same checkpoint with plain weights, by compressed-tensors' own code."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantization = QuantizationConfig.model_validate(config.pop("quantization_config"))
    (scheme,) = quantization.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(quantization.format)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {}
    for file in checkpoint.glob("*.safetensors"):
        stored |= load_file(file)
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        module = name.removesuffix("weight_scale")
        parts = {key: stored.pop(module + key) for key in PARTS if module + key in stored}
        stored[module + "weight"] = compressor.decompress(parts, scheme)["weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape")  # that may stand for one matrix


def main() -> None:
    """Read the prompts, answer, write."""
    checkpoint, asked, answered = sys.argv[1:]
    questions = np.load(asked)
    if "texts" in questions:
        np.savez(answered, losses=losses(checkpoint, questions["texts"]))
    else:
        np.savez(answered, **answer(checkpoint, questions["prompts"], int(questions["new_tokens"])))


if __name__ == "__main__":
    main()
