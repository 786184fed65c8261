"""The model that lm-evaluation-harness asks, against logits of the whole text, and tasks made of files."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import logsumexp

from moe.config import load_config
from moe.errors import UserError
from moe.evaluation.scoring import batched
from moe.evaluation.tasks import check_tasks, run_tasks
from moe.experiment import Experiment
from moe.mesh import MeshConfig, make_mesh
from moe.nn import Transformer, structure
from moe.training.state import initial_state

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from moe.evaluation.language_model import Checkpoint, CheckpointLM

TINY = str(Path(__file__).parents[1] / "end_to_end" / "tiny.py")
LENGTH = 24


@pytest.fixture(scope="module")
def checkpoint():
    """Of random weights, large enough that its likeliest tokens are not all the same."""
    experiment = load_config(TINY, Experiment)[0]
    model = replace(experiment.model, layers="M")
    tokenizer = experiment.data.tokenizer.build(())
    end = tokenizer.token_to_id(experiment.data.tokenizer.end_of_text)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        state = initial_state(model, optax.identity(), seed=3, average=False)
        params = jax.tree.map(lambda x: 3 * x, state.params)
        yield Checkpoint(model, params, state.controllers, tokenizer, end, LENGTH, 4, 1, "float32")


def logits(checkpoint: Checkpoint, tokens: list[int]) -> np.ndarray:
    """Of every token of a text, which nothing behind it can change."""
    padded = jnp.asarray([(tokens + [checkpoint.end_of_text] * LENGTH)[:LENGTH]])
    found = forward(structure(checkpoint.model)[0], checkpoint.params, checkpoint.controllers, padded)
    return np.asarray(found[0, : len(tokens)], np.float64)


@partial(jax.jit, static_argnums=0)
def forward(graph, params, controllers, tokens):
    model: Transformer = nnx.merge(graph, params, controllers)
    return model.logits(model(tokens)[0])


def expected(checkpoint: Checkpoint, context: list[int], following: list[int]) -> tuple[float, bool]:
    """By the definition."""
    text = context + following
    found = logits(checkpoint, text)
    log_p = found - logsumexp(found, axis=-1, keepdims=True)
    places = range(len(context) - 1, len(text) - 1)
    nats = sum(log_p[place, text[place + 1]] for place in places)
    return nats, all(found[place].argmax() == text[place + 1] for place in places)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def model(checkpoint):
    return CheckpointLM(checkpoint)


def test_loglikelihood_is_that_of_the_definition(checkpoint, model):
    pairs = [("ab", "cd"), ("a", "b"), ("", "xyz"), ("what a ", "day"), ("hello", " you")]
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, following), (nats, greedy) in zip(pairs, found, strict=True):
        trimmed = context.rstrip()
        tokens = model.tok_encode(trimmed) or [checkpoint.end_of_text]
        after = model.tok_encode(context[len(trimmed) :] + following)
        assert (nats, greedy) == (pytest.approx(expected(checkpoint, tokens, after)[0], rel=1e-4), greedy)
        assert greedy == expected(checkpoint, tokens, after)[1]


def test_the_likeliest_continuation_is_greedy(checkpoint, model):
    context = model.tok_encode("once")
    best = int(logits(checkpoint, context)[3].argmax())
    (_, greedy), (_, other) = model._loglikelihood_tokens(
        [(("", ""), context, [best]), (("", ""), context, [(best + 1) % 256])]
    )
    assert greedy and not other


def test_rolling_likelihood_predicts_every_token_once(checkpoint, model):
    text = "the quick brown fox jumps over the lazy dog"
    (short, long) = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text[:9],), (text,)), disable_tqdm=True
    )
    tokens = [checkpoint.end_of_text, *model.tok_encode(text)]
    assert short == pytest.approx(expected(checkpoint, tokens[:1], tokens[1:10])[0], rel=1e-4)
    # A window of 24, and one of the 19 that are left behind, with as much before them as fits.
    first = expected(checkpoint, tokens[:1], tokens[1 : LENGTH + 1])[0]
    rest = len(tokens) - 1 - LENGTH
    second = tokens[len(tokens) - 1 - LENGTH :]
    split = len(second) - rest
    assert long == pytest.approx(first + expected(checkpoint, second[:split], second[split:])[0], rel=1e-4)


def test_texts_that_are_too_long_lose_their_beginning():
    tokens, mask, scored = batched([([1, 2, 3, 4, 5], [6, 7]), ([8], [9])], rows=3, length=4, padding=0)
    assert tokens.tolist() == [[3, 4, 5, 6, 7], [8, 9, 0, 0, 0], [0] * 5]
    assert mask.tolist() == [[True] * 4, [True, False, False, False], [False] * 4]
    assert scored.tolist() == [[False, False, True, True], [True, False, False, False], [False] * 4]


def test_generation_stops_where_it_is_told(checkpoint, model):

    def made(prompt: str, **given) -> str:
        return model.generate_until(requests("generate_until", (prompt, given)), disable_tqdm=True)[0]

    whole = made("once upon", until=[], max_gen_toks=4)
    tokens = model.tok_encode("once upon")
    for _ in range(4):
        known = logits(checkpoint, tokens)[-1, : checkpoint.tokenizer.get_vocab_size()]
        tokens.append(int(known.argmax()))
    assert whole == checkpoint.tokenizer.decode(tokens[-4:], skip_special_tokens=False)
    stop = whole[2]
    assert made("once upon", until=[stop], max_gen_toks=4) == whole[: whole.index(stop)]
    assert made("once upon", until=stop, max_gen_toks=4) == whole[: whole.index(stop)]
    several = model.generate_until(
        requests(
            "generate_until",
            *((prompt, {"until": [], "max_gen_toks": 4}) for prompt in ("a", "once upon", "b", "c", "d")),
        )
    )
    assert several[1] == whole and len(several) == 5


CHOICE = {
    "task": "colours",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "The {{thing}} is",
    "doc_to_choice": ["red", "green"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
WRITING = {
    "task": "endings",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{thing}}",
    "doc_to_target": "{{ending}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def test_tasks_of_files(checkpoint, model, tmp_path, monkeypatch):
    """A choice is right where the likelier answer is the one that the file calls right."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    things = ("rose", "leaf", "sea", "frog")
    scored = model.loglikelihood(
        requests("loglikelihood", *((f"The {t} is", f" {c}") for t in things for c in ("red", "green"))),
        disable_tqdm=True,
    )
    likelier = [int(green[0] > red[0]) for red, green in zip(scored[::2], scored[1::2], strict=True)]
    endings = model.generate_until(
        requests("generate_until", *((t, {"until": ["\n"], "max_gen_toks": 4}) for t in things))
    )
    rows = [
        {"thing": thing, "answer": best if i else 1 - best, "ending": ending if i > 1 else "no such ending"}
        for i, (thing, best, ending) in enumerate(zip(things, likelier, endings, strict=True))
    ]
    data = tmp_path / "things.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    choice, writing = tmp_path / "colours.yaml", tmp_path / "endings.json"
    choice.write_text(json.dumps(CHOICE | files))  # JSON is YAML
    writing.write_text(json.dumps(WRITING | files))
    found = run_tasks(checkpoint, [str(choice), str(writing)], examples=0, fewshot=None)
    assert found["tasks"]["colours"]["acc,none"] == 0.75
    assert found["tasks"]["endings"]["exact_match,none"] == 0.5
    assert found["examples"] == {"colours": 4, "endings": 4}
    some = run_tasks(replace(checkpoint, rows=2), [str(choice)], examples=2, fewshot=0)
    assert some["tasks"]["colours"]["acc,none"] == 0.5


def test_what_cannot_be_run_is_one_line(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such file"):
        check_tasks([str(tmp_path / "none.yaml")])
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        run_tasks(checkpoint, [str(broken)], examples=0, fewshot=None)
    # All tasks of the harness take ten seconds to be looked through.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: Mock(match_tasks=lambda _: []))
    with pytest.raises(UserError, match="the harness has no such task"):
        run_tasks(checkpoint, ["no_such_task_at_all"], examples=0, fewshot=None)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("moe.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--extra tasks"):
        check_tasks(["x"])
