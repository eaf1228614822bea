"""Drafters by name, with options, and by folder."""

from __future__ import annotations

import pytest

from folders import save_drafter, save_model
from springtide.drafting.lookup import Lookup
from springtide.drafting.medusa import Medusa
from springtide.engine.drafters import DRAFTERS, find_drafter, find_folder
from springtide.errors import SpringtideError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"))
    save_drafter(folder / "drafters" / "medusa", folder)
    return folder


def test_one_without_weights_takes_options(model):
    assert find_drafter("lookup", None) == Lookup()
    assert find_drafter(" lookup:ngram=3,depth=8 ", model) == Lookup(ngram=3, depth=8)
    assert find_folder("lookup:ngram=3", model) is None


def test_one_with_weights_lies_beside_the_model(model):
    assert isinstance(find_drafter("medusa", model), Medusa)
    assert find_folder("medusa", model) == model / "drafters" / "medusa"


def test_a_folders_path_may_have_any_characters(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b=1,c=2", "lookup:ngram=3", "lookup:"):
        folder = save_drafter(tmp_path / name, model)
        for draft in (name, str(folder), folder):
            assert isinstance(find_drafter(draft, model), Medusa), draft
    (tmp_path / "lookup").mkdir()
    assert find_drafter("lookup", model) == Lookup(), "a name is a name"


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (
            "nosuch",
            "There is no drafter 'nosuch': choose lookup, medusa, medusa2, hidden-transfer, longspec, self, or give a",
        ),
        ("", "There is no drafter ''"),
        ("nosuch:ngram=3", "There is no drafter 'nosuch:ngram=3': choose lookup"),
        ("lookup:", "Drafter 'lookup': write 'lookup:OPTION=VALUE', or 'lookup' without the colon."),
        ("lookup:ngram=3,ngram=3", "Drafter 'lookup': 'ngram' is given twice; give it once."),
        ("lookup:ngram=many", "lookup: ngram is 'many', but it must be a whole number."),
        ("medusa:ngram=3", "Drafter 'medusa' has no option 'ngram'; its options are: none."),
        ("medusa2", "There is no drafter 'medusa2' beside this model"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(model, draft, message):
    with pytest.raises(SpringtideError) as caught:
        find_drafter(draft, model)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_every_drafter_says_what_it_is():
    assert all(cls.__doc__ for cls in DRAFTERS.kinds.values())
