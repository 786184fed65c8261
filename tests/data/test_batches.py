"""Windows, mixing, sharding and resuming, against what the token lists say they must be."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data import mixing_weights, train_batches, validation_batches
from moe.errors import UserError

ROWS = st.sampled_from([None, [0, 1], [2, 3], [1, 3], [2]])


def rows(batches, count):
    """The next `count` batches as one list of (slice, token tuple)."""
    found = []
    for _ in range(count):
        batch = next(batches)
        found += [(int(s), tuple(map(int, t))) for s, t in zip(batch["slice"], batch["tokens"], strict=True)]
    return found


def assert_equal_batches(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.lists(st.integers(0, 999), min_size=2, max_size=80),
    sequence_length=st.integers(1, 20),
    batch_size=st.integers(1, 5),
)
def test_every_validation_token_is_a_target_exactly_once(dataset_of, tokens, sequence_length, batch_size):
    dataset = dataset_of(a=([0] * 30, tokens), vocab_size=1000)
    inputs, targets = [], []
    for batch in validation_batches(dataset, "a", batch_size=batch_size, sequence_length=sequence_length):
        assert batch["tokens"].shape == (batch_size, sequence_length + 1)
        assert batch["weight"].shape == (batch_size, sequence_length)
        counted = batch["weight"] == 1
        assert ((batch["weight"] == 0) | counted).all()
        inputs += batch["tokens"][:, :-1][counted].tolist()
        targets += batch["tokens"][:, 1:][counted].tolist()
    assert inputs == tokens[:-1]
    assert targets == tokens[1:]


@settings(deadline=None, max_examples=20)
@given(length=st.integers(2, 60), chosen=st.sets(st.integers(0, 5), min_size=1))
def test_chosen_validation_rows_are_those_of_the_batch(dataset_of, length, chosen):
    dataset = dataset_of(a=([0] * 30, list(range(length))))
    arguments = dict(batch_size=6, sequence_length=4)
    whole = validation_batches(dataset, "a", **arguments)
    taken = sorted(chosen)
    part = validation_batches(dataset, "a", **arguments, rows=taken)
    for batch, rows_of_batch in zip(whole, part, strict=True):
        assert_equal_batches({name: array[taken] for name, array in batch.items()}, rows_of_batch)


def test_max_tokens_takes_windows_from_the_whole_split(dataset_of):
    dataset = dataset_of(a=([0] * 30, list(range(101))))
    arguments = dict(batch_size=3, sequence_length=10)
    batches = list(validation_batches(dataset, "a", **arguments, max_tokens=49))
    starts = [int(row[0]) for batch in batches for row in batch["tokens"][batch["weight"][:, 0] == 1]]
    assert sum(int(batch["weight"].sum()) for batch in batches) == 40
    assert starts[0] == 0
    assert starts[-1] == 90
    assert len(list(validation_batches(dataset, "a", **arguments, max_tokens=1000))) == 4


@settings(deadline=None, max_examples=20)
@given(windows=st.integers(1, 40), sequence_length=st.integers(1, 9), seed=st.integers(-5, 2**40))
def test_an_epoch_has_every_training_token_as_target_once(dataset_of, windows, sequence_length, seed):
    count = windows * sequence_length
    dataset = dataset_of(a=(list(range(count + 1)), [0, 0]))
    batches = train_batches(dataset, batch_size=1, sequence_length=sequence_length, seed=seed)
    epochs = [rows(batches, windows) for _ in range(2)]
    for epoch in epochs:
        assert sorted(target for _, row in epoch for target in row[1:]) == list(range(1, count + 1))
        assert all(row == tuple(range(row[0], row[0] + sequence_length + 1)) for _, row in epoch)


def test_epochs_and_seeds_have_their_own_order(dataset_of):
    dataset = dataset_of(a=(list(range(201)), [0, 0]))
    batches = train_batches(dataset, batch_size=1, sequence_length=2, seed=3)
    first, second = rows(batches, 100), rows(batches, 100)
    assert first != second
    assert first == rows(train_batches(dataset, batch_size=1, sequence_length=2, seed=3), 100)
    assert first != rows(train_batches(dataset, batch_size=1, sequence_length=2, seed=4), 100)


@settings(deadline=None, max_examples=10)
@given(
    chosen=st.sets(st.integers(0, 11), min_size=1),
    seed=st.integers(0, 1000),
    weights=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
)
def test_chosen_training_rows_are_those_of_the_batch(dataset_of, chosen, seed, weights):
    dataset = dataset_of(a=(list(range(100)), [0, 0]), b=(list(range(100, 260)), [0, 0]))
    arguments = dict(
        batch_size=12, sequence_length=7, seed=seed, weights=list(zip("ab", weights, strict=True))
    )
    taken = sorted(chosen)
    whole, part = train_batches(dataset, **arguments), train_batches(dataset, **arguments, rows=taken)
    for _ in range(5):
        assert_equal_batches({name: array[taken] for name, array in next(whole).items()}, next(part))


@settings(deadline=None, max_examples=20)
@given(position=st.integers(0, 60), before=ROWS, after=ROWS, elsewhere=st.integers(0, 20))
def test_a_restored_iterator_continues_exactly_for_any_rows(dataset_of, position, before, after, elsewhere):
    dataset = dataset_of(a=(list(range(90)), [0, 0]), b=(list(range(100, 150)), [0, 0]))

    def make(chosen):
        return train_batches(dataset, batch_size=4, sequence_length=5, seed=1, rows=chosen)

    batches, expected = make(before), make(after)
    for _ in range(position):
        next(batches)
        next(expected)
    state = json.loads(json.dumps(batches.get_state()))
    assert len(json.dumps(state)) < 200
    restored = make(after)
    for _ in range(elsewhere):  # wherever it stood before, prefetched batches included
        next(restored)
    restored.set_state(state)
    for _ in range(12):
        assert_equal_batches(next(expected), next(restored))


@settings(deadline=None, max_examples=6)
@given(weights=st.lists(st.floats(0.02, 1), min_size=3, max_size=3))
def test_rows_come_in_proportion_to_the_weights(dataset_of, weights):
    dataset = dataset_of(
        **{name: (list(range(size)), [0, 0]) for name, size in dict(a=30, b=300, c=3).items()}
    )
    batches = train_batches(
        dataset, batch_size=50, sequence_length=2, weights=list(zip("abc", weights, strict=True))
    )
    counts = Counter(slice_id for slice_id, _ in rows(batches, 40))
    for slice_id, weight in enumerate(weights):
        share = weight / sum(weights)
        assert counts[slice_id] == pytest.approx(2000 * share, rel=0.02, abs=3)


def test_without_weights_slices_come_in_proportion_to_their_tokens(dataset_of):
    dataset = dataset_of(a=([0] * 100, [0, 0]), b=([0] * 300, [0, 0]))
    assert mixing_weights(dataset, ()) == {"a": 0.25, "b": 0.75}


def test_a_slice_that_no_weight_names_is_left_out(dataset_of):
    dataset = dataset_of(a=([0] * 100, [0, 0]), b=([1] * 3, [0, 0]))
    assert mixing_weights(dataset, [("a", 2.0)]) == {"a": 1.0, "b": 0.0}
    batches = train_batches(dataset, batch_size=8, sequence_length=10, weights=[("a", 2.0), ("b", 0.0)])
    assert {slice_id for slice_id, _ in rows(batches, 5)} == {0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("fictoin", 1.0)], "'fictoin', which is no slice; the nearest is 'fiction'"),
        ([("fiction", -1.0)], "fiction=-1.0"),
        ([("fiction", float("nan"))], "fiction=nan"),
        ([("fiction", 0.0)], "all 0"),
    ],
)
def test_bad_weights_are_named(dataset_of, weights, message):
    dataset = dataset_of(fiction=([0] * 100, [0, 0]), code=([0] * 100, [0, 0]))
    with pytest.raises(UserError, match=message):
        mixing_weights(dataset, weights)


def test_a_slice_shorter_than_a_window_is_named(dataset_of):
    dataset = dataset_of(a=([0] * 100, [0, 0]), b=([0] * 10, [0, 0]))
    with pytest.raises(UserError, match=r"slice 'b' has 10 train tokens, and one window takes 11"):
        train_batches(dataset, batch_size=2, sequence_length=10)
    assert rows(train_batches(dataset, batch_size=2, sequence_length=9), 1)
