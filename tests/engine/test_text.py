"""Text comes out of tokens whole, whatever the pieces they come in."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from folders import VOCAB, spaced_tokenizer, tokenizer
from springtide.engine.text import Detokenizer

some_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=24)
some_text = st.text(st.sampled_from("ab é€😀👩‍👩‍👧\n.") | st.characters(codec="utf-8"), max_size=16)
cuts = st.lists(st.integers(0, 30), max_size=6)
few = settings(max_examples=80, deadline=None)


def chunks(tokens: list[int], places: Iterable[int]) -> list[list[int]]:
    bounds = [0, *sorted(min(place, len(tokens)) for place in places), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(bounds)]


def singly(tokens: list[int]) -> list[list[int]]:
    return [[token] for token in tokens]


def run(text: Detokenizer, pieces: Iterable[list[int]]) -> str:
    """Feed pieces as the engine does; returns what came out, joined."""
    out = ""
    for piece in pieces:
        out += text.add(list(piece))
        assert out == text.text
        if text.stopped:
            break
    out += text.finish()
    assert out == text.text
    return out


@few
@given(some_tokens, cuts)
def test_any_tokens_in_any_pieces_give_what_decode_gives(tokens, places):
    expected = tokenizer().decode(tokens, skip_special_tokens=True)
    assert run(Detokenizer(tokenizer()), chunks(tokens, places)) == expected
    assert run(Detokenizer(tokenizer()), singly(tokens)) == expected


@few
@given(some_text, cuts)
@example("👩‍👩‍👧 naïve 😀😀", [3, 5])
def test_characters_of_many_tokens_come_whole(text, places):
    tokens = tokenizer().encode(text)
    shown = Detokenizer(tokenizer())
    for chunk in singly(tokens):
        assert "\ufffd" not in shown.add(chunk)
    assert shown.text == text
    assert run(Detokenizer(tokenizer()), chunks(tokens, places)) == text


@few
@given(st.text("ab. é😀", max_size=12).map(str.strip), cuts)
def test_spaces_between_words_survive_a_tokenizer_that_strips_the_first(text, places):
    tokens = spaced_tokenizer().encode(text, add_special_tokens=False)
    expected = spaced_tokenizer().decode(tokens)
    assert run(Detokenizer(spaced_tokenizer()), singly(tokens)) == expected
    assert run(Detokenizer(spaced_tokenizer()), chunks(tokens, places)) == expected


def test_an_emoji_is_held_back_until_its_last_byte():
    tokens = tokenizer().encode("a😀b")
    text = Detokenizer(tokenizer())
    assert [text.add([token]) for token in tokens] == ["a", "", "", "", "😀", "b"]


def test_a_character_that_never_ends_is_shown_at_the_end():
    tokens = tokenizer().encode("a😀")[:-1]
    text = Detokenizer(tokenizer())
    assert "".join(text.add([token]) for token in tokens) == "a"
    assert text.finish() == "\ufffd"


def cut_at(text: str, stops: Iterable[str]) -> str:
    """The text before the stop string that ends first."""
    met = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(met)[1]] if met else text


@few
@given(
    st.text("ab ", max_size=14),
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts,
)
@example("abc", ["abc", "b"], [])
def test_nothing_from_a_stop_string_on_comes_out(text, stops, places):
    tokens = tokenizer().encode(text)
    expected = cut_at(text, stops)
    for pieces in (chunks(tokens, places), singly(tokens)):
        shown = Detokenizer(tokenizer(), tuple(stops))
        assert run(shown, pieces) == expected
        assert shown.stopped == (expected != text or any(stop in text for stop in stops))


@few
@given(some_tokens, st.integers(0, 20), st.integers(1, 5), cuts)
def test_stop_strings_cut_out_of_random_text_are_met(tokens, start, length, places):
    whole = tokenizer().decode(tokens, skip_special_tokens=True)
    stop = whole[start : start + length]
    if not stop or "\ufffd" in whole:
        return
    shown = Detokenizer(tokenizer(), (stop,))
    assert run(shown, chunks(tokens, places)) == cut_at(whole, [stop])
    assert shown.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("stop here", ["stop"], ""),
        ("aaab", ["aab"], "a"),
        ("abab abc", ["abc"], "abab "),
        ("one END two", ["END", " END"], "one"),
        ("no such thing", ["STOP"], "no such thing"),
        ("half a ST", ["STOP"], "half a ST"),
        ("é😀 end", ["😀"], "é"),
    ],
)
def test_stop_strings(text, stops, expected):
    assert run(Detokenizer(tokenizer(), tuple(stops)), singly(tokenizer().encode(text))) == expected


def test_what_may_begin_a_stop_string_is_held_back_and_then_released():
    text = Detokenizer(tokenizer(), ("xyz",))
    tokens = [tokenizer().encode(c)[0] for c in "axyb"]
    assert [text.add([token]) for token in tokens] == ["a", "", "", "xyb"]


def test_tokens_after_a_stop_string_give_nothing():
    text = Detokenizer(tokenizer(), ("x",))
    tokens = [tokenizer().encode(c)[0] for c in "axbc"]
    assert text.add(tokens) == "a"
    assert text.add(tokens) == ""
    assert text.finish() == ""
    assert text.text == "a"


def test_special_tokens_do_not_show():
    words = tokenizer().encode("The ship")
    assert run(Detokenizer(tokenizer()), singly([0, *words, 1])) == "The ship"
