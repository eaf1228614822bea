"""``auto`` takes the drafters that are advised for these weights on this machine."""

from __future__ import annotations

import json

import pytest
import torch

import springtide
from folders import edit_json, save_drafter, save_model
from springtide import SpringtideError
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.engine import advice

AUTO = ["lookup", "medusa"]


@pytest.fixture
def model(tmp_path):
    folder = save_model(tmp_path / "model")
    save_drafter(folder / "drafters" / "medusa", folder)
    return folder


def ways(model, **options):
    return list(springtide.load(model, draft="auto", **options).drafter.ways)


def test_auto_without_advice_is_all_that_there_is(model):
    assert ways(model) == AUTO


def test_auto_is_what_is_advised(model):
    stack = springtide.load(model).stack
    path = advice.write(stack, ["lookup:tokens=6"], [{"context": 80}])
    assert path == model / "advice.json" and json.loads(path.read_text())["contexts"] == [{"context": 80}]
    assert springtide.load(model, draft="auto").drafter == Lookup(tokens=6)
    assert springtide.load(stack.model, draft="auto").drafter == Lookup(tokens=6), "of a loaded model"
    session = springtide.load(model).session()
    assert session.add([1, 2, 3], draft="auto").drafter == Lookup(tokens=6), "of a request"
    advice.write(stack, ["medusa", "lookup:tokens=6"], [])
    assert ways(model) == ["medusa", "lookup"]
    advice.write(stack, [], [])
    assert springtide.load(model, draft="auto").drafter.name == Drafter.name
    assert list(model.glob("*advice*")) == [path]


@pytest.mark.parametrize("what", ["machine", "model"])
def test_advice_for_others_is_ignored(model, what):
    path = advice.write(springtide.load(model).stack, [], [])
    edit_json(path, lambda content: content.update({what: "another"}))
    assert ways(model) == AUTO


def test_advice_is_for_a_dtype_and_a_number_of_threads(model):
    advice.write(springtide.load(model).stack, ["lookup"], [])
    assert ways(model) == ["lookup"] and ways(model, dtype="bfloat16") == AUTO
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert ways(model) == AUTO
    finally:
        torch.set_num_threads(threads)


def test_a_model_that_is_not_the_users_has_its_advice_in_their_folder(tmp_path, home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = save_model(tmp_path / "models--a--b" / "snapshots" / "0123")
    before = sorted(folder.iterdir())
    path = advice.write(springtide.load(folder).stack, ["lookup:tokens=6"], [])
    assert path.is_relative_to(home / "data" / "springtide") and sorted(folder.iterdir()) == before
    assert springtide.load(folder, draft="auto").drafter == Lookup(tokens=6)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "'version'"),
        ('{"version": 99}', "it is of another version of Springtide"),
        ('{"version": 1, "drafters": "lookup", "model": "", "machine": ""}', "drafters are no list of names"),
    ],
)
def test_a_file_that_is_broken(model, content, fault):
    (model / "advice.json").write_text(content)
    with pytest.raises(SpringtideError) as caught:
        ways(model)
    assert str(caught.value).startswith(f"The advice in '{model / 'advice.json'}' cannot be used ({fault}")
    assert str(caught.value).endswith("; run `springtide advise` again or delete the file.")


def test_a_drafter_that_is_not_there_any_more(model):
    advice.write(springtide.load(model).stack, ["lookup", str(model / "gone")], [])
    with pytest.raises(SpringtideError) as caught:
        ways(model)
    assert str(caught.value).startswith(f"The advice in '{model / 'advice.json'}' cannot be used (There is no drafter")
