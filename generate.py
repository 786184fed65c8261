"""Go on with a text: prompts in, a trained run's continuations out.

    uv run generate.py runs/quickstart --prompt "Once upon a time"
    uv run generate.py runs/quickstart --prompt "Once upon a time" --temperature 0 --max-new-tokens 50
    uv run generate.py runs/quickstart --prompts prompts.jsonl --out continuations.jsonl --cache int8

The text of a prompt is printed as it is made. A file holds a prompt a line; a file named .jsonl an object a
line, with "prompt" and, if you like, temperature, seed, stop and so on for that prompt alone. What comes of a
file are objects too, a line each, in its order. Speed is told at the end, on stderr.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import jax
import tokenizers

from moe.config import override
from moe.data import TrainedBPE, prepare
from moe.data.tokenizer import vocabulary_size
from moe.decode import CacheType, Decoder, Engine, Request, Sampling, dropped_in_training, for_decoding
from moe.decode.prompts import Drawing, read_file
from moe.decode.text import TextStream
from moe.errors import UserError, run_main
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from moe.nn.quantized import quantize_params
from moe.quant import format_named
from moe.training.restore import restore
from moe.training.run_directory import read_experiment

SLOTS_PER_DEVICE = 8  # for prompts from a file
STEPS_AT_ONCE = 16  # where nobody watches the text come


@dataclass(frozen=True)
class Options(Drawing):
    """What to go on with, and how."""

    prompt: str | None = None
    """A text to go on with; "" begins a new one."""

    prompts: str = ""
    """File of prompts: a line each, or with the suffix .jsonl an object each."""

    out: str = ""
    """File for the continuations of `prompts`, instead of standard output."""

    checkpoint: str = "last"
    """`last`, `best` (lowest validation loss while training) or a step."""

    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of activations and matrices; None takes the one of training."""

    quantize: str = ""
    """Quantise the matrices first: int8, int8-dynamic (activations too), int4 or fp8, with a group size
    int4-128. Runs that hold quantised weights need no such word."""

    cache: CacheType | None = None
    """How keys and values are stored; None takes the precision of activations."""

    length: int = 0
    """Tokens that the cache holds of each sequence; 0 takes as many as the longest needs."""

    slots: int = 0
    """Prompts gone on with at once, over all devices; 0 takes one each, up to eight a device."""

    expert: int = 1
    """Devices along the mesh's `expert` axis; the rest lie along `data`."""

    def __post_init__(self):
        super().__post_init__()
        if self.quantize:
            format_named(self.quantize)
        for name in ("length", "slots"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")


class Task(NamedTuple):
    """A prompt, and how to go on with it."""

    prompt: str
    tokens: tuple[int, ...]
    drawing: Drawing


class Piece(NamedTuple):
    """New text of a task."""

    task: int
    """Its number, in the order of submission."""

    text: str
    ended: Literal["length", "end of text", "stop string"] | None
    """Why nothing comes after it; None where something may."""


def main() -> None:
    """Read the command line, generate, tell how fast."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError('give a run directory first: uv run generate.py runs/quickstart --prompt "Once upon"')
    directory = Path(sys.argv[1])
    options = override(Options(), sys.argv[2:], prog=f"generate.py {directory}", description=__doc__ or "")
    experiment = in_precision(read_experiment(directory), options.compute_dtype)
    for_decoding(experiment.model)
    if options.quantize and experiment.quantization.weights:
        raise UserError(f"{directory} is quantised already; generate from it without --quantize")
    prompts = read_prompts(options)
    jax.set_mesh(make_mesh(MeshConfig(expert=options.expert)))

    tokenizer, end_of_text = read_tokenizer(experiment)
    tasks = []
    for prompt, drawing in prompts:
        tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
        tasks.append(Task(prompt, tuple(tokens) or (end_of_text,), drawing))
    length = options.length or max(len(task.tokens) + task.drawing.max_new_tokens for task in tasks)

    restored = restore(directory, experiment, options.checkpoint)
    params = restored.state.evaluated
    if options.quantize:
        params = quantize_params(params, format_named(options.quantize), experiment.model.dtype)
    engine = Engine(
        Decoder.of(experiment.model, params, restored.state.controllers),
        vocabulary=vocabulary_size(tokenizer),
        slots=options.slots or slots_for(len(tasks)),
        length=length,
        cache=options.cache or cache_type(experiment),
        steps=STEPS_AT_ONCE if options.prompts else 1,
    )
    del restored, params
    numbers = [engine.submit(request(task, end_of_text)) for task in tasks]
    with opened(options.out) as file:
        tell_notes(experiment, length)
        pieces = generate(engine, tokenizer, dict(zip(numbers, tasks, strict=True)))
        if options.prompts:
            write(file, tasks, pieces)
        else:
            for text in (tasks[0].prompt, *(piece.text for piece in pieces), "\n"):
                print(text, end="", flush=True)


def request(task: Task, end_of_text: int) -> Request:
    """A task as the engine takes it."""
    drawing = task.drawing
    sampling = Sampling(**{field.name: getattr(drawing, field.name) for field in fields(Sampling)})
    return Request(
        task.tokens, drawing.max_new_tokens, sampling, () if drawing.ignore_end else (end_of_text,)
    )


def generate(engine: Engine, tokenizer: tokenizers.Tokenizer, tasks: dict[int, Task]) -> Iterator[Piece]:
    """New text of the tasks that were submitted, by number; at the end a line on stderr tells the speed."""
    began = time.perf_counter()
    engine.warm_up(len(task.tokens) for task in tasks.values())
    compiled = time.perf_counter()
    streams = {
        number: TextStream(tokenizer, task.tokens, task.drawing.stop) for number, task in tasks.items()
    }
    first, count = 0.0, 0
    for made in engine.run():
        first = first or time.perf_counter()
        count += len(made.tokens)
        stream, text = streams[made.request], ""
        for token in made.tokens[: -1 if made.stopped else None]:
            text += stream.push(token)
            if stream.stopped:
                break
        if stream.stopped:
            engine.cancel(made.request)
            yield Piece(made.request, text, "stop string")
        elif made.last:
            yield Piece(made.request, text + stream.rest(), "end of text" if made.stopped else "length")
        else:
            yield Piece(made.request, text, None)
    rate = f", then {(count - 1) / (time.perf_counter() - first):,.0f} tokens/s" if count > 1 else ""
    print(
        f"{sum(len(task.tokens) for task in tasks.values()):,} tokens read, {count:,} made; compiled in "
        f"{compiled - began:.1f} s, first token after {1000 * (first - compiled):.0f} ms{rate}",
        file=sys.stderr,
    )


def write(file: TextIO, tasks: list[Task], pieces: Iterator[Piece]) -> None:
    """A line of JSON for each task, in their order, each as soon as all before it have ended."""
    texts, ended, written = [""] * len(tasks), {}, 0
    for piece in pieces:
        texts[piece.task] += piece.text
        if piece.ended:
            ended[piece.task] = piece.ended
        while written in ended:
            line = {"prompt": tasks[written].prompt, "text": texts[written], "ended": ended[written]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            written += 1


@contextmanager
def opened(out: str) -> Iterator[TextIO]:
    """Where continuations go: standard output, or a file that gets its name when it is whole.

    Raises:
        UserError: it cannot be written.
    """
    if not out:
        yield sys.stdout
        return
    partial = Path(out + ".partial")
    try:
        if Path(out).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a file that can be written") from error
    with file:
        yield file
    partial.replace(out)


def read_prompts(options: Options) -> list[tuple[str, Drawing]]:
    """Every prompt, and how to go on with it.

    Raises:
        UserError: there is none, the file cannot be read, or a line of it is no good.
    """
    drawing = Drawing(**{field.name: getattr(options, field.name) for field in fields(Drawing)})
    if (options.prompt is None) == (not options.prompts):
        raise UserError('give one of --prompt "a text" and --prompts FILE')
    if options.prompt is None:
        return read_file(Path(options.prompts), drawing)
    if options.out:
        raise UserError("--out is for --prompts; the text of --prompt goes to standard output")
    return [(options.prompt, drawing)]


def read_tokenizer(experiment: Experiment) -> tuple[tokenizers.Tokenizer, int]:
    """A run's tokenizer, and the token between texts. One trained on the corpus lies beside its tokens."""
    data = experiment.data
    if isinstance(data.tokenizer, TrainedBPE):
        tokenizer = tokenizers.Tokenizer.from_file(str(prepare(data).tokenizer))
    else:
        tokenizer = data.tokenizer.build(())
    tokenizer.encode_special_tokens = True  # as in training: a text that spells out <|endoftext|> goes on
    experiment.check_vocabulary(vocabulary_size(tokenizer))
    end_of_text = tokenizer.token_to_id(data.tokenizer.end_of_text)
    assert end_of_text is not None, "a tokenizer without it is refused when it is built"
    return tokenizer, end_of_text


def tell_notes(experiment: Experiment, length: int) -> None:
    """Say on stderr what makes generation differ from training."""
    dropped, trained = dropped_in_training(experiment.model), experiment.data.sequence_length
    if dropped:
        print(f"note: {dropped} dropped tokens in training; generating drops none", file=sys.stderr)
    if length > trained + 1:
        print(
            f"note: up to {length} tokens in a row; the model was trained on {trained}, and knows no more",
            file=sys.stderr,
        )


def in_precision(experiment: Experiment, dtype: str | None) -> Experiment:
    """The experiment with another precision of activations and matrices, if one was asked for."""
    return replace(experiment, model=replace(experiment.model, compute_dtype=dtype)) if dtype else experiment


def cache_type(experiment: Experiment) -> CacheType:
    """How keys and values are stored where nothing else was asked for."""
    return "bfloat16" if experiment.model.compute_dtype == "bfloat16" else "float32"


def slots_for(tasks: int) -> int:
    """One for each task, up to eight a device, on every device the same number."""
    devices = jax.device_count()
    return devices * min(-(-tasks // devices), SLOTS_PER_DEVICE)


if __name__ == "__main__":
    run_main(main)
