"""The parameters of a run's checkpoint, read a layer at a time, without its optimizer."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tensorstore

from moe.checkpoint import CONTENTS, STATE, Checkpoints, CheckpointStore
from moe.errors import UserError
from moe.nn.quantized import HEAD, format_of_axes
from moe.quant import Format, QuantizedMatrix, dequantize
from moe.seal import find_damage


def find_checkpoint(directory: Path, config: Checkpoints, which: str) -> Path:
    """The folder of one intact checkpoint of a run.

    Args:
        directory: of the run.
        config: of its checkpoints.
        which: `last`, `best` or a step. A line on stderr names newer ones that are damaged.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = directory / "checkpoints"
    with CheckpointStore(folder, config) as store:
        steps, best = store.steps(), store.best_step()
    if which == "last":
        for step in reversed(steps):
            damage = find_damage(folder / str(step))
            if damage is None:
                return folder / str(step)
            print(f"checkpoint {step} is damaged ({damage}): left out", file=sys.stderr)
        raise UserError(f"{directory} has no intact checkpoint; train on, or put back a copy of one")
    step = best if which == "best" else int(which) if which.isdecimal() else None
    if step not in steps:
        raise UserError(f"--checkpoint {which}: say last, best (if the run evaluated) or one of {steps}")
    damage = find_damage(folder / str(step))
    if damage is not None:
        raise UserError(f"checkpoint {step} in {folder} is damaged ({damage}); take another of {steps}")
    return folder / str(step)


class CheckpointWeights:
    """What a checkpoint holds of a model: the parameters that evaluation uses, and the controllers' bias.

    Args:
        checkpoint: folder of an intact checkpoint.
        format: of its matrices, where the run holds quantised ones.

    Raises:
        UserError: it does not hold such.
    """

    def __init__(self, checkpoint: Path, format: Format | None = None):
        self._format = format
        contents = json.loads((checkpoint / CONTENTS).read_text())
        self.step: int = contents["step"]
        self.averaged = any(name.startswith("average/") for name in contents["leaves"])
        self._state = checkpoint.absolute() / STATE
        roots = ("average" if self.averaged else "params", "controllers")
        names = {name.removesuffix("/value"): name for name in contents["leaves"]}
        self._stored = {
            name.removeprefix(f"{root}/"): stored
            for root in roots
            for name, stored in names.items()
            if name.startswith(f"{root}/")
        }
        if format and not any(name.endswith("/value/values") for name in self._stored):
            raise UserError(f"{checkpoint} holds no quantised weights, as its run's config.json says it does")

    def read(self, leaf: str, place: int | None) -> np.ndarray | None:
        """One layer's part of a parameter (`moe.export.assemble.ReadWeights`); of a quantised matrix what it
        stands for, float32."""
        if (matrix := self.quantized(leaf, place)) is not None:
            return np.asarray(dequantize(matrix))
        found = self._part(leaf, place)
        # Beside quantised matrices the embedding is bfloat16, which NumPy's users do not expect.
        return found.astype(np.float32) if self._format and found is not None else found

    def quantized(self, leaf: str, place: int | None) -> QuantizedMatrix | None:
        """The same of a quantised matrix, as it is held; None for any other parameter."""
        parts = [self._part(f"{leaf}/value/{name}", place) for name in ("values", "scales")]
        if self._format is None or parts[0] is None:
            return None
        own = format_of_axes(HEAD, self._format) if leaf == "head" else self._format
        assert own is not None
        values, scales = map(jnp.asarray, parts)
        return QuantizedMatrix(values, scales, own)

    def _part(self, name: str, place: int | None) -> np.ndarray | None:
        if name not in self._stored:
            return None
        store = {"driver": "ocdbt", "base": f"file://{self._state}/", "path": self._stored[name] + "/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
        return (array if place is None else array[place]).read().result()
