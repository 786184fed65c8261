"""generate.py as a user runs it, against the model's full forward pass."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from workshop import TINY, Workshop, checkpoint, fingerprint

from moe.data import Bytes
from moe.mesh import MeshConfig, make_mesh
from moe.nn import structure
from moe.training.run_directory import read_experiment

END = 256  # the end of a text, behind the bytes


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Path:
    assert workshop.call("train.py", TINY, "--train.steps", "8").code == 0
    return workshop.runs / "tiny"


def generate(workshop: Workshop, *arguments: str, devices: int = 1):
    return workshop.run("generate.py", "runs/tiny", *arguments, devices=devices)


def answers(lines: str) -> list[dict]:
    """Objects, a line each; a text may hold what else str.splitlines takes for the end of a line."""
    return [json.loads(line) for line in lines.removesuffix("\n").split("\n")]


def greedy(run: Path, prompt: str, most: int) -> str:
    """By the whole forward pass, token after token, with the moving average of the parameters."""
    experiment, state = read_experiment(run), checkpoint(run, 8).state
    tokens = np.zeros((1, len(prompt.encode()) + most), np.int32)
    tokens[0, : len(prompt)] = list(prompt.encode())
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = nnx.merge(structure(experiment.model)[0], state.average, state.controllers)
        forward = jax.jit(lambda model, tokens: model.logits(model(tokens)[0])[0])
        for i in range(len(prompt), tokens.shape[1]):
            tokens[0, i] = np.asarray(forward(model, tokens))[i - 1, : END + 1].argmax()
            if tokens[0, i] == END:
                return Bytes().build(()).decode(tokens[0, :i].tolist())
    return Bytes().build(()).decode(tokens[0].tolist())


def test_a_prompt_is_gone_on_with_and_the_speed_told(workshop: Workshop, run: Path):
    before = fingerprint(run)
    ended = generate(workshop, "--prompt", "the cat ", "--temperature", "0", "--max-new-tokens", "20")
    assert ended.code == 0
    assert ended.out == greedy(run, "the cat ", 20) + "\n"
    *notes, speed = ended.err.splitlines()
    assert notes == []
    assert speed.startswith("8 tokens read, ")
    assert "first token after" in speed and speed.endswith("tokens/s")
    assert fingerprint(run) == before


def test_a_file_of_prompts_on_one_device_and_on_eight(workshop: Workshop, run: Path):
    prompts = ["the cat ", "a mat", "return x", "", "dreamt\u2028and"]
    (workshop.folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    command = ("--prompts", "prompts.txt", "--max-new-tokens", "12", "--cache", "float32")
    ended = generate(workshop, *command, "--temperature", "0")
    lines = answers(ended.out)
    assert [line["prompt"] for line in lines] == prompts
    for line in lines[:3]:
        assert line["prompt"] + line["text"] == greedy(run, line["prompt"], 12)
    for devices, expert in ((8, "1"), (8, "4")):
        arguments = (*command, "--temperature", "0", "--expert", expert, "--out", "on_eight.jsonl")
        assert generate(workshop, *arguments, devices=devices).out == ""
        assert answers((workshop.folder / "on_eight.jsonl").read_text(encoding="utf-8")) == lines


def test_lines_of_json_say_how_to_draw(workshop: Workshop, run: Path):
    whole = greedy(run, "the cat ", 12).removeprefix("the cat ")
    asked = [
        {"prompt": "the cat ", "temperature": 0},
        {"prompt": "the cat ", "temperature": 0, "stop": [whole[5:7]]},
        {"prompt": "the cat ", "temperature": 0, "max_new_tokens": 3},
        {"prompt": "the cat ", "temperature": 5.0, "seed": 1},
        {"prompt": "the cat ", "temperature": 5.0, "seed": 1},
        {"prompt": "the cat ", "temperature": 5.0, "seed": 2},
    ]
    (workshop.folder / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    ended = generate(workshop, "--prompts", "asked.jsonl", "--max-new-tokens", "12", "--slots", "2")
    all_, stopped, short, first, again, other = (line["text"] for line in answers(ended.out))
    assert all_ == whole
    assert stopped == whole[: whole.index(whole[5:7])]
    assert short == whole[:3]
    assert first == again != other
    ends = [line["ended"] for line in answers(ended.out)]
    assert ends[:3] == ["length", "stop string", "length"]


REFUSED = {
    "no run": (("runs/none", "--prompt", "a"), "runs/none holds no run"),
    "no prompt": (("runs/tiny",), "give one of --prompt"),
    "two kinds of prompt": (("runs/tiny", "--prompt", "a", "--prompts", "b"), "give one of --prompt"),
    "no file": (("runs/tiny", "--prompts", "none.txt"), "--prompts none.txt cannot be read"),
    "nothing in it": (("runs/tiny", "--prompts", "empty.txt"), "--prompts empty.txt is empty"),
    "not JSON": (("runs/tiny", "--prompts", "broken.jsonl"), "broken.jsonl:1: not JSON"),
    "no prompt in a line": (("runs/tiny", "--prompts", "nameless.jsonl"), 'must be an object with "prompt"'),
    "a mistyped option": (("runs/tiny", "--prompts", "typed.jsonl"), "typed.jsonl:1: seed: expected int"),
    "a bad option": (("runs/tiny", "--prompts", "hot.jsonl"), "hot.jsonl:1: temperature=-1.0 must"),
    "nothing to make": (("runs/tiny", "--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens=0 must"),
    "a stop string in all": (("runs/tiny", "--prompts", "stop.jsonl"), "stop.jsonl:1: stop=('',) must not"),
    "a prompt too long": (("runs/tiny", "--prompt", "abcdef", "--length", "5"), "longer than the cache of 5"),
    "no temperature": (("runs/tiny", "--prompt", "a", "--temperature", "-1"), "temperature=-1.0 must be at"),
    "no checkpoint": (("runs/tiny", "--prompt", "a", "--checkpoint", "3"), "no checkpoint 3"),
    "an odd number of slots": (("runs/tiny", "--prompt", "a", "--slots", "3"), "multiple of the 8 devices"),
    "no folder for the answers": (
        ("runs/tiny", "--prompts", "one.txt", "--out", "none/out.jsonl"),
        "--out none/out.jsonl: No such file",
    ),
    "a file for one answer": (("runs/tiny", "--prompt", "a", "--out", "b"), "--out is for --prompts"),
    "a model that looks ahead": (("runs/choice", "--prompt", "a"), "model.moe.routing=ExpertChoice"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals(workshop: Workshop, run: Path, why: str):
    files = {
        "empty.txt": "",
        "one.txt": "a\n",
        "broken.jsonl": "{\n",
        "nameless.jsonl": "{}\n",
        "typed.jsonl": '{"prompt": "a", "seed": "b"}\n',
        "hot.jsonl": '{"prompt": "a", "temperature": -1}\n',
        "stop.jsonl": '{"prompt": "a", "stop": [""]}\n',
    }
    for name, text in files.items():
        (workshop.folder / name).write_text(text)
    if not (workshop.runs / "choice").exists():
        looks_ahead = ("--model.moe.routing", "ExpertChoice()", "--model.moe.balance", "()")
        few = ("--name", "choice", "--train.steps", "1")
        assert workshop.call("train.py", TINY, *few, *looks_ahead).code == 0
    arguments, message = REFUSED[why]
    ended = workshop.call("generate.py", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    [line] = ended.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_capacity_and_long_texts_are_noted(workshop: Workshop):
    capacity = ("--model.moe.dispatch", "Capacity(1.0)", "--name", "drops", "--train.steps", "1")
    assert workshop.call("train.py", TINY, *capacity).code == 0
    ended = workshop.run("generate.py", "runs/drops", "--prompt", "a cat", "--max-new-tokens", "40")
    first, second, _ = ended.err.splitlines()
    assert first.startswith("note: model.moe.dispatch=Capacity(") and "generating drops none" in first
    assert second.startswith("note: up to 45 tokens in a row; the model was trained on 32")
