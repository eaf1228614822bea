"""Policies and drafters from text."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.attention import POLICIES, parse_policy
from springtide.attention.tidal import Tidal
from springtide.errors import SpringtideError
from springtide.options import Share, option
from springtide.registry import REGISTRIES, Nested, Registry, split

NESTED = "self:policy=(tidal:sinks=3,pool=max),tokens=6"


@dataclass(frozen=True)
class Itself:
    """Drafts by the model itself."""

    policy: Annotated[Any, Nested("policy")] = option(None, "what it attends by")
    tokens: int = option(4, "tokens that are drafted")
    within: Annotated[Any, Nested("trial")] | None = option(None, "another one")


@pytest.fixture(autouse=True)
def trials(monkeypatch):
    """A registry of things that hold policies and each other."""
    monkeypatch.setattr("springtide.registry.REGISTRIES", dict(REGISTRIES))
    return Registry("trial", {"self": Itself})


def test_options_are_read_by_their_types():
    policy = parse_policy(" tidal:budget = 5%, full=0+1 ,select=2,pool=mean")
    assert policy == Tidal(budget=Share(5), full=(0, 1), select=2, pool="mean")
    assert parse_policy("tidal", 9) == Tidal(budget=9) == parse_policy("tidal:budget=9", 12)
    assert parse_policy("dense", 9) == parse_policy("dense")


def test_a_value_may_have_options_of_its_own(trials):
    assert trials.parse("self:policy=(tidal:budget=256,sinks=3),tokens=6") == Itself(Tidal(budget=256, sinks=3), 6)
    assert trials.parse("self:tokens=6,policy=dense") == trials.parse("self:policy=(dense),tokens=6")
    deep = trials.parse("self:within=(self:policy=(tidal:budget=7,sinks=1),tokens=5),tokens=6")
    assert deep == Itself(tokens=6, within=Itself(Tidal(budget=7, sinks=1), 5))
    assert trials.parse("self:within=none") == Itself()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "Unknown policy 'fast': choose one of dense, tidal, quest, streaming, oracle."),
        ("", "Unknown policy '': choose one of dense, tidal, quest, streaming, oracle."),
        ("tidal:", "Policy 'tidal': write 'tidal:OPTION=VALUE', or 'tidal' without the colon."),
        ("tidal:budget", "Policy 'tidal': write 'budget=VALUE', not 'budget'."),
        ("tidal:budget=", "Policy 'tidal': write 'budget=VALUE', not 'budget='."),
        ("tidal:=3", "Policy 'tidal': write 'OPTION=VALUE', not '=3'."),
        ("tidal:budget=3,", "Policy 'tidal': write 'OPTION=VALUE', not ''."),
        ("tidal:budget=3,,sinks=2", "Policy 'tidal': write 'OPTION=VALUE', not ''."),
        ("tidal:budget=3,sinks=2,budget=3", "Policy 'tidal': 'budget' is given twice; give it once."),
        ("dense:budget=3", "Policy 'dense' has no option 'budget'; its options are: none."),
        ("quest:pages=3", "Policy 'quest' has no option 'pages'; its options are: budget, skip, page, pool."),
        ("tidal:map=none", "Policy 'tidal' has no option 'map'; its options are: budget, full, "),
        ("tidal:budget=(3", "The parentheses in 'budget=(3' do not match; close each one that is opened."),
        ("tidal:budget=3)", "The parentheses in 'budget=3)' do not match; close each one that is opened."),
        ("tidal:budget=(3)", "tidal: budget is '(3)', but it must be a whole number, or a share such as 5%."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text, message):
    with pytest.raises(SpringtideError) as caught:
        parse_policy(text)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "self:policy=tidal:budget=3",
            "A policy with options that is itself an option's value is written '(tidal:budget=3)'.",
        ),
        ("self:policy=(fast)", "Unknown policy 'fast': choose one of dense"),
        ("self:policy=()", "Unknown policy '': choose one of dense"),
        ("self:policy=(dense)(tidal)", "Unknown policy 'dense)(tidal': choose one of dense"),
        ("self:policy=((dense))", "Unknown policy '(dense)': choose one of dense"),
        ("self:within=(self:tokens=many)", "self: tokens is 'many', but it must be a whole number."),
        ("self:within=(self:within=(self:tokens=1)", "The parentheses in 'within=(self:within=(self:tokens=1)' do not"),
    ],
)
def test_wrong_nesting_is_said_in_a_sentence(trials, text, message):
    with pytest.raises(SpringtideError) as caught:
        trials.parse(text)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@given(st.text("dense:tidal,budget=64()+% ", max_size=30))
def test_any_text_is_read_or_refused(text):
    for part in (text, f"tidal:{text}"):
        with suppress(SpringtideError):
            parse_policy(part)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dense,tidal:budget=64,sinks=4,quest", ["dense", "tidal:budget=64,sinks=4", "quest"]),
        (" dense , tidal:budget=64, sinks = 4 ", ["dense", "tidal:budget=64,sinks = 4"]),
        (
            "self:policy=(tidal:budget=2,sinks=3),tokens=6,dense",
            ["self:policy=(tidal:budget=2,sinks=3),tokens=6", "dense"],
        ),
        ("a:b=(c:d=(e:f=1,g=2),h=3),i=4,(j,k)", ["a:b=(c:d=(e:f=1,g=2),h=3),i=4", "(j,k)"]),
        ("dense,budget=64", ["dense", "budget=64"]),
        (",,", []),
    ],
)
def test_lists_are_cut_between_things_not_inside_them(text, parts):
    assert split(text) == parts and split(",".join(parts)) == parts


def test_lists_keep_folders_whole(tmp_path):
    odd, twin = tmp_path / "a:b=1,c=2,lookup", tmp_path / "plain"
    odd.mkdir(), twin.mkdir()
    assert split(f"lookup:ngram=3,depth=2,{odd},{twin}", folders=True) == [
        "lookup:ngram=3,depth=2",
        str(odd),
        str(twin),
    ]


def test_every_option_says_what_it_is():
    assert all(POLICIES.kinds[name].__doc__ for name in POLICIES.kinds)


def test_a_list_longer_than_a_path_may_be():
    parts = [f"lookup:ngram={n}" for n in range(1, 600)]
    assert split(",".join(parts), folders=True) == parts
