"""Runs where transformers is: quantised checkpoints in compressed-tensors' own reading.

python decompressed_by_transformers.py CLIENTS FOLDER

FOLDER/prompts.npy is asked. Of FOLDER/NAME/ it writes FOLDER/NAME-plain/, the same with plain weights, and
FOLDER/NAME.npz and FOLDER/NAME-plain.npz, what transformers answers that has loaded the one and the other.
"""

import json
import sys
from pathlib import Path

import numpy as np
import transformers

sys.path.insert(0, sys.argv[1])
from run_transformers import answer, decompress

NEW_TOKENS = 4


def main() -> None:
    """Decompress and answer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(sys.argv[2])
    prompts = np.load(folder / "prompts.npy")
    for config in sorted(folder.glob("*/config.json")):
        quantized = config.parent
        plain = folder / f"{quantized.name}-plain"
        plain.mkdir()
        decompress(quantized, json.loads(config.read_text()), plain)
        for checkpoint in (quantized, plain):
            np.savez(folder / f"{checkpoint.name}.npz", **answer(str(checkpoint), prompts, NEW_TOKENS))


if __name__ == "__main__":
    main()
