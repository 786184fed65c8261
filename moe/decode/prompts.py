"""Prompts, and how each is gone on with."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from moe.config.fields import declared_types, fit
from moe.decode.sampling import Sampling
from moe.errors import UserError, one_line


@dataclass(frozen=True)
class Drawing(Sampling):
    """How one prompt is gone on with."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token (greedy)."""

    max_new_tokens: int = 128
    """Most tokens to generate."""

    stop: tuple[str, ...] = ()
    """Strings at which to stop, themselves left out. The end of a text stops too."""

    ignore_end: bool = False
    """Go on behind the end of a text, into the next one."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if "" in self.stop:
            raise UserError(f"stop={self.stop} must not hold an empty string, which every text does")


def read_file(path: Path, drawing: Drawing) -> list[tuple[str, Drawing]]:
    """The prompts of a file, a line each, or of one named .jsonl an object a line.

    The n-th has n added to its seed.

    Raises:
        UserError: the file cannot be read, or a line of it is no good.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read ({one_line(error)})") from error
    if lines == [""]:
        raise UserError(f"--prompts {path} is empty; give a prompt a line")
    prompts = []
    for number, line in enumerate(lines):
        one = replace(drawing, seed=(drawing.seed + number) % 2**32)
        in_json = path.suffix == ".jsonl"
        prompts.append(_from_object(line, one, f"{path}:{number + 1}") if in_json else (line, one))
    return prompts


def _from_object(line: str, drawing: Drawing, where: str) -> tuple[str, Drawing]:
    """A prompt, and how to go on with it, from a line of JSON."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {one_line(error)}") from error
    types = {"prompt": str, **declared_types(Drawing)}
    if not isinstance(given, dict) or "prompt" not in given or given.keys() - types.keys():
        raise UserError(f'{where}: must be an object with "prompt", and may have {", ".join(types)}')
    values = {
        name: fit(tuple(value) if isinstance(value, list) else value, types[name], f"{where}: {name}")
        for name, value in given.items()
    }
    try:
        return values.pop("prompt"), replace(drawing, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
