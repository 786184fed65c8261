"""Continuous batching: what a request gets does not depend on what is generated beside it."""

import jax
import numpy as np
import pytest
from random_models import VOCABULARY, built, config, full_logits

from moe.decode import CacheType, Engine, Request, Sampling
from moe.errors import UserError
from moe.mesh import MeshConfig, make_mesh
from moe.routing import TopK

LENGTH = 40
CONFIG = config("DM", routing=TopK(2))


@pytest.fixture(scope="module")
def one():
    """The model, and an engine of four slots on one device."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model, decoder = built(CONFIG)
        yield model, engine(decoder)


def engine(decoder, slots: int = 4, steps: int = 3, cache: CacheType = "float32") -> Engine:
    return Engine(decoder, vocabulary=VOCABULARY, slots=slots, length=LENGTH, cache=cache, steps=steps)


def requests(**sampling) -> list[Request]:
    """Ten, of different lengths."""
    random = np.random.default_rng(0)
    return [
        Request(
            tuple(random.integers(0, VOCABULARY, 1 + 3 * i).tolist()),
            max_new_tokens=1 + (7 * i) % 11,
            sampling=Sampling(**{"seed": i, **sampling}),
        )
        for i in range(10)
    ]


def assert_greedy(model, asked: list[Request], answers: list[list[int]], within: float = 0.0) -> None:
    """Every answer is what the whole forward pass finds most likely, or nearly so, token by token."""
    assert [len(answer) for answer in answers] == [request.max_new_tokens for request in asked]
    rows = np.zeros((len(asked), LENGTH), np.int32)
    for row, request, answer in zip(rows, asked, answers, strict=True):
        row[: len(request.prompt) + len(answer)] = [*request.prompt, *answer]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        logits = full_logits(model, rows)
    for row, request, answer in zip(logits, asked, answers, strict=True):
        before = row[len(request.prompt) - 1 :][: len(answer)]
        taken = np.take_along_axis(before, np.array(answer)[:, None], 1)[:, 0]
        assert (before.max(1) - taken <= within * logits.std()).all()


def test_greedy_tokens_are_those_of_the_full_forward_pass(one):
    model, engine = one
    asked = requests(temperature=0.0)
    assert_greedy(model, asked, engine.generate(asked))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)], ids=str)
def test_eight_devices_share_the_slots(one, shape):
    model, _ = one
    asked = requests(temperature=0.0)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=shape[0], expert=shape[1]))):
        _, decoder = built(CONFIG)
        assert_greedy(model, asked, engine(decoder, slots=8).generate(asked))


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_rounded_cache_finds_tokens_near_the_best(one, cache):
    model, _ = one
    asked = requests(temperature=0.0)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=4))):
        _, decoder = built(CONFIG)
        assert_greedy(model, asked, engine(decoder, slots=8, cache=cache).generate(asked), within=0.05)


def test_a_request_gets_the_same_tokens_alone_and_among_others(one):
    _, engine = one
    asked = requests(temperature=1.3, top_k=20, top_p=0.9)
    together = engine.generate(asked)
    assert [engine.generate([request])[0] for request in asked] == together
    assert engine.generate(asked[::-1])[::-1] == together
    assert len(set(map(tuple, together))) > 5


def test_steps_at_once_change_nothing(one):
    _, three = one
    asked = requests(temperature=0.9)
    assert engine(built(CONFIG)[1], steps=1).generate(asked) == three.generate(asked)


def test_the_seed_decides(one):
    _, engine = one
    prompt = (3, 1, 4)
    seeded = [Request(prompt, 12, Sampling(temperature=2.0, seed=seed)) for seed in (0, 1, 0)]
    first, other, again = engine.generate(seeded)
    assert first == again != other


def test_a_stop_token_ends_a_request_and_is_told(one):
    _, engine = one
    asked = requests(temperature=1.0)
    whole = engine.generate(asked)
    stops = [answer[len(answer) // 2] for answer in whole]
    stopping = [
        Request(request.prompt, request.max_new_tokens, request.sampling, (VOCABULARY - 1, stop))
        for request, stop in zip(asked, stops, strict=True)
    ]
    for made in (numbers := {engine.submit(request): [] for request in stopping}) and engine.run():
        numbers[made.request].append(made)
    for told, answer, stop in zip(numbers.values(), whole, stops, strict=True):
        tokens = [token for made in told for token in made.tokens]
        ends = {answer.index(token) for token in (VOCABULARY - 1, stop) if token in answer}
        assert tokens == answer[: min(ends) + 1]
        assert [made.last for made in told] == [False] * (len(told) - 1) + [True]
        assert told[-1].stopped


def test_a_cancelled_request_is_told_no_more_and_frees_its_slot(one):
    _, engine = one
    asked = requests(temperature=1.0)
    whole = engine.generate(asked)
    numbers = [engine.submit(request) for request in asked]
    engine.cancel(numbers[9])  # one that waits
    found = {number: [] for number in numbers}
    for made in engine.run():
        found[made.request] += made.tokens
        if made.request == numbers[3] and not made.last:
            engine.cancel(numbers[3])
    tokens = list(found.values())
    assert tokens[9] == []
    assert tokens[3] == whole[3][: len(tokens[3])]
    assert 0 < len(tokens[3]) < len(whole[3])
    assert [tokens[i] for i in (0, 1, 2, *range(4, 9))] == [whole[i] for i in (0, 1, 2, *range(4, 9))]


def test_a_request_may_come_while_others_go_on(one):
    _, engine = one
    first, *others = requests(temperature=1.0)[4:]
    whole = engine.generate([first, *others])
    found, waiting = {engine.submit(first): []}, list(others)
    for made in engine.run():
        found[made.request] += made.tokens
        if waiting:
            found[engine.submit(waiting.pop(0))] = []
    assert list(found.values()) == whole


def test_a_sequence_ends_where_its_slot_is_full(one):
    _, engine = one
    prompt = tuple(range(LENGTH - 2))
    (answer,) = engine.generate([Request(prompt, 100, Sampling(temperature=0.0))])
    assert len(answer) == 3  # two that are fed, and one more


def test_what_does_not_fit_is_refused(one):
    _, ready = one
    for prompt, why in (
        ((), "at least one token"),
        (tuple(range(LENGTH + 1)), "longer than the cache of 40"),
    ):
        with pytest.raises(UserError, match=why):
            ready.submit(Request(prompt))
    with pytest.raises(UserError, match="max_new_tokens=0"):
        Request((1,), max_new_tokens=0)
    with pytest.raises(UserError, match="9 stop tokens"):
        Request((1,), stop_tokens=tuple(range(9)))
    with jax.set_mesh(make_mesh(MeshConfig())), pytest.raises(UserError, match="multiple of the 8 devices"):
        engine(None, slots=4)
