"""Text out of tokens as they come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.data import Bytes, ShippedBPE
from moe.decode.text import TextStream

TOKENIZER = {"bytes": Bytes().build(()), "bpe": ShippedBPE().build(())}


def streamed(text: str, tokenizer: str = "bpe", prompt: str = "", stop: tuple[str, ...] = ()):
    """What each token adds, the rest, and whether it stopped."""
    build = TOKENIZER[tokenizer]
    stream = TextStream(build, build.encode(prompt).ids, stop)
    parts = []
    for token in build.encode(text).ids:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return [*parts, stream.rest()], stream.stopped


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.sampled_from(["bytes", "bpe"]))
def test_the_parts_are_the_text(text, tokenizer):
    assert "".join(streamed(text, tokenizer, prompt="Once ")[0]) == text


@given(st.sampled_from(["bytes", "bpe"]), st.text(st.characters(codec="utf-8"), max_size=4), st.data())
def test_the_parts_of_any_tokens_are_what_they_decode_to(tokenizer, prompt, data):
    build = TOKENIZER[tokenizer]
    tokens = data.draw(st.lists(st.integers(0, build.get_vocab_size() - 1), max_size=12))
    before = build.encode(prompt).ids
    stream = TextStream(build, before)
    text = "".join(stream.push(token) for token in tokens) + stream.rest()
    assert build.decode(before, skip_special_tokens=False) + text == build.decode(
        before + tokens, skip_special_tokens=False
    )


def test_a_character_comes_when_it_is_whole():
    parts, _ = streamed("aé語", "bytes")
    assert parts == ["a", "", "é", "", "", "語", ""]


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.sampled_from(["bytes", "bpe"]),
)
def test_text_ends_before_the_first_stop_string(text, stops, tokenizer):
    parts, stopped = streamed(text, tokenizer, stop=tuple(stops))
    first = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(first)
    if tokenizer == "bytes":  # of longer tokens several may come at once
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        seen = text[: min(ends, default=len(text))]
        first = [at for stop in stops if (at := seen.find(stop)) >= 0]
        assert "".join(parts) == text[: min(first, default=len(text))]
    assert not any(stop in "".join(parts) for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    parts, stopped = streamed("xxab.ab!", "bytes", stop=("ab!",))
    assert parts == ["x", "x", "", "", "ab.", "", "", "", ""]
    assert stopped


@pytest.mark.parametrize("tokenizer", TOKENIZER)
def test_what_was_held_back_comes_at_the_end(tokenizer):
    parts, stopped = streamed("no sto", tokenizer, stop=("stop",))
    assert ("".join(parts), stopped) == ("no sto", False)
