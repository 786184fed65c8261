"""Safetensors files: written tensor by tensor, and read tensor by tensor.

The format: the length of the header in 8 bytes, the header (JSON: dtype, shape and place of every tensor),
the tensors. The `safetensors` package reads; it writes only what is in memory whole, so writing stands here.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import ml_dtypes
import numpy as np
import safetensors

from moe.errors import UserError, one_line

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What is read."""
QUANTIZED = {
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""What quantised matrices are written in besides."""
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class SafetensorsWriter:
    """One or several safetensors files and, for several, their index; tensors come one after the other.

    Args:
        folder: where the files go.
        entries: all tensors, in the order in which they will come.
        shard_bytes: a new file begins where one would grow beyond this.
    """

    def __init__(self, folder: Path, entries: list[Entry], shard_bytes: int):
        self._folder = folder
        self._shards: list[list[Entry]] = [[]]
        for entry in entries:
            if self._shards[-1] and sum(e.nbytes for e in self._shards[-1]) + entry.nbytes > shard_bytes:
                self._shards.append([])
            self._shards[-1].append(entry)
        count = len(self._shards)
        self._names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            self._names = ["model.safetensors"]
        self._waiting = iter(
            [(shard, entry) for shard, entries in enumerate(self._shards) for entry in entries]
        )
        self._open = -1

    def __enter__(self) -> Self:
        return self

    def write(self, parts: Iterable[np.ndarray]) -> None:
        """Write the next tensor, in the dtype announced for it.

        Args:
            parts: what, one after the other along its first axis or a new one, makes it up.
        """
        shard, entry = next(self._waiting)
        if shard != self._open:
            self._begin(shard)
        written = 0
        for part in parts:
            written += self._file.write(np.ascontiguousarray(part, entry.dtype).view(np.uint8).data)
        if written != entry.nbytes:
            raise ValueError(f"{entry.name} has {written} bytes and was announced with {entry.nbytes}")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open >= 0:
            self._file.close()
        if kind is None:
            left = next(self._waiting, None)
            if left is not None:
                raise ValueError(f"{left[1].name} was announced and never came")
            self._write_index()

    def _begin(self, shard: int) -> None:
        if self._open >= 0:
            self._file.close()
        self._open, self._file = shard, (self._folder / self._names[shard]).open("wb")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        codes = {dtype: code for code, dtype in (DTYPES | QUANTIZED).items()}
        for entry in self._shards[shard]:
            place = [offset, offset + entry.nbytes]
            header[entry.name] = {
                "dtype": codes[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": place,
            }
            offset = place[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(entry.nbytes for shard in self._shards for entry in shard)},
            "weight_map": {
                entry.name: name
                for name, shard in zip(self._names, self._shards, strict=True)
                for entry in shard
            },
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=1))


class SafetensorsFolder:
    """All tensors of a checkpoint, in one file or in several.

    Args:
        folder: of the checkpoint.

    Raises:
        UserError: a file is missing or damaged, or the weights are pickled.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open = {name: self._opened(name) for name in self._files()}
        self._file_of = {name: file for file, handle in self._open.items() for name in handle.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, which every dtype that is read fits into.

        Raises:
            UserError: it is of another dtype.
        """
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise UserError(
                f"{self._folder / self._file_of[name]}: {name} is {code}; give a checkpoint in "
                f"{', '.join(DTYPES)}"
            )
        return self._open[self._file_of[name]].get_tensor(name).astype(np.float32)

    def _slice(self, name: str):
        return self._open[self._file_of[name]].get_slice(name)

    def _files(self) -> Iterator[str]:
        index = self._folder / INDEX
        if index.is_file():
            try:
                files = json.loads(index.read_text())["weight_map"].values()
                names = sorted({Path(name).name for name in files})  # never of another folder
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index} cannot be read ({one_line(error)}); fetch it again") from error
        else:
            names = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if not names:
            raise self._no_weights()
        for name in names:
            if not (self._folder / name).is_file():
                raise UserError(f"{self._folder / name} is missing; fetch it again")
            numbered = re.fullmatch(r".*-of-0*(\d+)\.safetensors", name)
            if numbered and not index.is_file() and int(numbered[1]) != len(names):
                raise UserError(
                    f"{self._folder} has {len(names)} of the {numbered[1]} files that {name} speaks of; "
                    "fetch the others"
                )
        yield from names

    def _no_weights(self) -> UserError:
        pickled = sorted(path.name for pattern in PICKLES for path in self._folder.glob(pattern))
        if pickled:
            return UserError(
                f"{self._folder / pickled[0]} is a pickle, which can run any code and is not read; "
                "fetch the safetensors files"
            )
        return UserError(f"{self._folder} holds no *.safetensors file; give the folder of a checkpoint")

    def _opened(self, name: str):
        path = self._folder / name
        try:
            return safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}); fetch it again") from error
