"""Drafters by name, with options, and by folder."""

from __future__ import annotations

import pytest

from folders import save_drafter, save_model
from springtide.drafting.lookup import Lookup
from springtide.drafting.medusa import Medusa
from springtide.drafting.several import Several
from springtide.engine.drafters import DRAFTERS, find_adapter, find_drafter, find_folder
from springtide.errors import SpringtideError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"))
    save_drafter(folder / "drafters" / "medusa", folder)
    return folder


@pytest.fixture(scope="module")
def changed(model, tmp_path_factory):
    """A drafter that changes the model."""
    return save_drafter(tmp_path_factory.mktemp("changed"), model, adapter=True)


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


def test_several_are_joined_by_commas(model, tmp_path):
    folder = save_drafter(tmp_path / "a,b", model)
    for draft in (
        "lookup:ngram=3,depth=8, medusa",
        f"lookup:ngram=3,depth=8,{folder}",
        "(lookup:depth=8,ngram=3,medusa)",
    ):
        found = find_drafter(draft, model)
        assert isinstance(found, Several) and found.drafters[0] == Lookup(ngram=3, depth=8)
        assert list(found.ways) == ["lookup", "medusa"] and find_adapter(draft, model) is None
    assert find_drafter("(lookup)", model) == Lookup() == find_drafter("lookup,", model)


def test_auto_is_lookup_and_all_beside_the_model_that_leave_it_as_it_is(model, changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "auto").mkdir()  # a name is a name
    assert find_drafter("auto", None) == Lookup() == find_drafter("auto", changed)
    assert list(find_drafter("auto", model).ways) == ["lookup", "medusa"]
    (model / "drafters" / "medusa2").symlink_to(changed)
    (model / "drafters" / "notes").mkdir()
    assert list(find_drafter("auto", model).ways) == ["lookup", "medusa"] and find_adapter("auto", model) is None
    (model / "drafters" / "medusa2").unlink()
    (model / "drafters" / "notes").rmdir()


def test_one_that_changes_the_model_cannot_be_one_of_several(model, changed):
    assert find_adapter(changed, model) == changed / "adapter"
    for find in (find_drafter, find_adapter):
        with pytest.raises(SpringtideError) as caught:
            find(f"lookup,{changed}", model)
        assert str(caught.value) == (
            f"The drafter '{changed}' comes with an adapter, which changes the model, so it cannot be one of several; "
            "name it alone."
        )


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
        ("lookup,nosuch", "There is no drafter 'nosuch': choose lookup"),
        ("lookup,medusa,lookup:ngram=3", "Two of the drafters are 'lookup'; give one of each kind."),
        ("(lookup,medusa", "The parentheses in '(lookup,medusa' do not match"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(model, draft, message):
    with pytest.raises(SpringtideError) as caught:
        find_drafter(draft, model)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_every_drafter_says_what_it_is():
    assert all(cls.__doc__ for cls in DRAFTERS.kinds.values())
