"""Models of the Hugging Face hub, from one on this machine."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

import springtide
from folders import PROMPT, save_drafter, save_model
from hub import serving
from springtide import SpringtideError
from springtide.loading import calibration_folder
from springtide.model.source import find_model

NAME, NOWHERE = "Some/model", "http://127.0.0.1:9"


@pytest.fixture
def online(tmp_path, monkeypatch):
    """The hub, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as hub:
        reach(hub.url, monkeypatch)
        yield hub


def reach(url, monkeypatch):
    """The hub is there."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("other"), hidden_size=64)


def outputs(model, **options):
    return springtide.load(model, **options).generate(PROMPT, max_tokens=6).token_ids


def test_a_model_is_fetched_once(online, folder, monkeypatch):
    commit = online.add(NAME, folder)
    expected = outputs(folder)
    assert outputs(NAME) == expected
    assert sorted(online.fetched) == sorted(set(online.fetched)) == sorted(os.listdir(folder))
    assert outputs(NAME) == expected and len(online.fetched) == len(os.listdir(folder))
    place = find_model(NAME).path
    assert place.name == commit and place.is_relative_to(constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert outputs(NAME) == expected


def test_a_revision(online, folder, other):
    online.add(NAME, folder)
    commit = online.add(NAME, other, "smaller")
    expected = outputs(other)
    assert outputs(NAME, revision="smaller") == outputs(NAME, revision=commit) == expected != outputs(NAME)
    with pytest.raises(SpringtideError, match=r"'Some/model' has no revision 'none'; give a branch, a tag or a commit"):
        springtide.load(NAME, revision="none")


def test_only_what_is_needed_is_fetched(online, folder, tmp_path):
    fat = shutil.copytree(folder, tmp_path / "fat")
    for name in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "README.md", "a.onnx"):
        (fat / name).parent.mkdir(exist_ok=True)
        (fat / name).write_bytes(b"no")
    online.add(NAME, fat)
    assert outputs(NAME) == outputs(folder)
    assert sorted(online.fetched) == sorted(os.listdir(folder))


def test_weights_in_the_old_format(online, folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), old / "pytorch_model.bin")
    online.add(NAME, old)
    assert outputs(NAME) == outputs(folder)


def test_an_architecture_that_is_not_supported_is_not_fetched(online, folder, tmp_path):
    foreign = shutil.copytree(folder, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "gpt2"}')
    online.add(NAME, foreign)
    with pytest.raises(SpringtideError, match="Architecture 'gpt2' is not supported"):
        springtide.load(NAME)
    assert "model.safetensors" not in online.fetched


def test_nothing_is_written_into_the_cache(online, folder):
    online.add(NAME, folder)
    engine = springtide.load(NAME)
    place = find_model(NAME).path
    assert not calibration_folder(engine.stack.model).is_relative_to(constants.HF_HUB_CACHE)
    assert sorted(os.listdir(place)) == sorted(os.listdir(folder))


def test_a_calibration_that_was_published_with_the_model(online, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "springtide.json").write_text(json.dumps({"version": 2, "tidal": {"full": [], "select": [0, 2]}}))
    online.add(NAME, own)
    assert springtide.load(NAME, policy="tidal:budget=8").policy.selecting == (0, 2)


# -- what cannot be fetched -----------------------------------------------------------------------------------------


def refused(name, *parts, **options):
    with pytest.raises(SpringtideError) as caught:
        springtide.load(name, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and all(part in message for part in parts), message


def test_a_name_that_nobody_has(online):
    refused("No/such", "There is no model folder 'No/such'", "hub has no such model; check the name", "hf auth login")


def test_a_model_that_asks_for_access(online, folder):
    online.add(NAME, folder)
    online.refused[NAME] = 403
    refused(NAME, "'Some/model' is gated; ask for access at", "`hf auth login`")


def test_a_private_model(online, folder):
    online.add(NAME, folder)
    online.refused[NAME] = 404
    refused(NAME, "hub has no such model", "private")


def test_a_token_that_has_expired(online, folder):
    online.add(NAME, folder)
    online.refused[NAME] = 401
    refused(NAME, "hub does not accept your token; run `hf auth login`, or unset HF_TOKEN")


def test_a_model_without_configuration(online, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model-Q4.gguf").write_bytes(b"GGUF")
    online.add(NAME, tmp_path / "files")
    refused(NAME, "'Some/model' on the Hugging Face hub has no config.json", "download a GGUF file and give that")


def test_a_hub_that_fails(online, folder):
    online.add(NAME, folder)
    online.refused[NAME] = 500
    refused(NAME, "There is no model folder 'Some/model'", "hub cannot be reached", "check the network")


def test_no_network(online, monkeypatch):
    reach(NOWHERE, monkeypatch)
    refused(NAME, "There is no model folder 'Some/model'", "hub cannot be reached", "check the network")


def test_a_download_that_was_cut_short(online, folder, monkeypatch):
    online.add(NAME, folder)
    place = find_model(NAME).path
    (place / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(NAME, "The weights of 'Some/model' are not all in the cache, and offline mode is on; unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reach(NOWHERE, monkeypatch)
    refused(NAME, "The weights of 'Some/model' are not all in the cache, and the Hugging Face hub cannot be reached")


def test_what_transformers_fetched_is_enough_without_a_network(online, folder, monkeypatch):
    """It takes fewer files than there are."""
    expected = outputs(folder)
    more = {"merges.txt": b"", "LICENSE.txt": b"yours"}
    own = shutil.copytree(folder, folder.parent / "more")
    for name, body in more.items():
        (own / name).write_bytes(body)
    online.add(NAME, own)
    place = find_model(NAME).path
    for name in more:
        (place / name).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert outputs(NAME) == expected


def test_offline(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(NAME, "There is no model folder 'Some/model'", "offline mode is on", "HF_HUB_OFFLINE")


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "a/b/c", "~/nosuch", "", "no such", "a--b/c", "a/b/"])
def test_what_is_no_name_of_the_hub(online, name):
    refused(name, f"There is no model folder '{name}'; give a folder with config.json")
    assert not online.fetched


def test_a_folder_has_no_revisions(folder):
    refused(folder, "is no model of the hub, so it has no revision 'main'; leave it out", revision="main")
    model = AutoModelForCausalLM.from_pretrained(folder)
    refused(model, "A revision is for a model of the hub, not for a loaded one", revision="main")


# -- on the command line --------------------------------------------------------------------------------------------


def test_verbs_take_names_and_revisions(online, folder, other, run):
    online.add(NAME, folder)
    online.add(NAME, other, "smaller")
    for revision, own in (([], folder), (["--revision", "smaller"], other)):
        base = ["--max-tokens", 6, "--device", "cpu"]
        result = run("generate", PROMPT, "--model", NAME, *revision, *base)
        assert (result.code, result.err) == (0, "")
        assert result.out == run("generate", PROMPT, "--model", own, *base).out
    run("generate", PROMPT, "--model", NAME, "--revision", "none").refused("has no revision 'none'")
    run("generate", PROMPT, "--revision", "main").refused("'pocket' is no model of the hub, so it has no revision")
    run("bench", "decode", "--shape", "llama-1b", "--revision", "main").refused("Give either --revision or --shape")


def test_drafters_of_a_model_of_the_hub(online, folder, run, tmp_path):
    online.add(NAME, folder)
    drafter = save_drafter(tmp_path / "drafter", folder)
    command = ["eval", "drafts", "--model", NAME, "--draft", drafter, "--length", 32, "--max-tokens", 4]
    assert run(*command, "--prompts", 1).code == 0
