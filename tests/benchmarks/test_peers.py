"""Every peer decodes the same model: its tokens are the engine's. Those that are not installed are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from folders import save_model
from springtide import SpringtideError
from springtide.attention.calibration import VERSION
from springtide.benchmarks import contenders, exports, peers
from springtide.benchmarks.peers import PEERS, Target
from springtide.engine.engine import Engine
from springtide.model.source import Source
from tiny import random_tokens, tiny

PROMPT = random_tokens(60)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def target(model, folder=Path("nowhere")) -> Target:
    return Target(model, "tiny", 256, 1, folder)


def check(peer, engine):
    """It reads, starts from a cache that is there, and forgets, as often as one likes."""
    expected = engine.generate(PROMPT, max_tokens=12, ignore_eos=True).token_ids
    reader = engine.read(PROMPT)
    for _ in range(2):
        for start, source in ((peer.read, PROMPT), (peer.resume, reader)):
            assert [start(source), *(peer.step() for _ in range(11))] == expected
            peer.forget()
    assert reader.cache.length == len(PROMPT)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text"])
def test_transformers(name):
    """Its own cache of sliding windows holds what it needs too."""
    check(PEERS["transformers"](target(tiny(name))), Engine(tiny(name)))


@pytest.mark.parametrize("policy", ["dense", "tidal:budget=8"])
def test_springtide(policy):
    engine = Engine(
        tiny("llama"), policy=policy, calibration={"version": VERSION, "tidal": {"full": [0], "select": [1]}}
    )
    check(contenders.Springtide(engine, policy), engine)


def test_one_token():
    engine = Engine(tiny("llama"))
    reader = engine.read(PROMPT[:1])
    expected = engine.generate(PROMPT[:1], max_tokens=1).token_ids
    for contender in (PEERS["transformers"](target(tiny("llama"))), contenders.Springtide(engine, "dense")):
        assert [contender.resume(reader)] == expected


@pytest.mark.parametrize("peer", ["openvino", "llama.cpp"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_installed_peers(peer, name, options, tmp_path):
    for module in PEERS[peer].packages:
        pytest.importorskip(module)
    model = tiny.__wrapped__(name, **options)
    before = {key: (weight.data_ptr(), weight.clone()) for key, weight in model.state_dict().items()}
    implementation = model.config._attn_implementation
    contender = PEERS[peer](target(model, tmp_path))
    check(contender, Engine(model))
    for key, weight in model.state_dict().items():
        assert weight.data_ptr() == before[key][0] and torch.equal(weight, before[key][1])
    assert model.config._attn_implementation == implementation
    assert len(os.listdir(tmp_path / "tiny")) == 1


@pytest.mark.parametrize("peer", ["openvino", "llama.cpp"])
def test_what_cannot_be_exported_is_refused(peer):
    with pytest.raises(SpringtideError, match=f"--against {peer} takes Llama and Qwen3 models only, not 'gemma2'"):
        PEERS[peer](target(tiny("gemma2")))


def test_openvino_on_one_thread_is_refused():
    with pytest.raises(SpringtideError, match="use more --threads"):
        PEERS["openvino"](target(tiny("llama", dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("name", "install"),
    [("openvino", "openvino==2026.4.0 openvino-genai==2026.4.0.0"), ("llama.cpp", "llama-cpp-python gguf")],
)
def test_what_is_not_installed_is_refused(monkeypatch, name, install):
    def missing(module):
        raise ImportError(f"No module named '{module}'")

    monkeypatch.setattr(peers, "import_module", missing)
    with pytest.raises(
        SpringtideError, match=rf"--against {name} needs other packages \(No module.*\); run `pip install {install}`"
    ):
        peers.check_peers([name])
    peers.check_peers(["transformers"])
    with pytest.raises(SpringtideError, match=r"Unknown peer 'vllm': choose among transformers, openvino, llama\.cpp"):
        peers.check_peers(["transformers", "vllm"])


def test_exports_are_written_once_and_whole(tmp_path):
    path = tmp_path / "a" / "b"

    def fail(place):
        place.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SpringtideError, match=r"cannot be written \(No space left on device\).*--cache"):
        exports.once(path, fail)
    assert os.listdir(tmp_path / "a") == []
    assert exports.once(path, lambda place: place.write_text("whole")) == path
    assert exports.once(path, fail).read_text() == "whole"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_other_weights_have_another_name(tmp_path):
    folder = save_model(tmp_path / "model")
    name = peers.weights_name(Source(folder), "float32")
    assert name.startswith("model-float32-")
    assert name == peers.weights_name(Source(folder), "float32") != peers.weights_name(Source(folder), "bfloat16")
    os.utime(folder / "model.safetensors", (1, 1))
    assert name != peers.weights_name(Source(folder), "float32")
