"""Heads from and for other projects, which the classes of the first section stand for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from springtide.cli import main
from springtide.drafting.folder import read_folder, write_folder
from springtide.drafting.medusa import Heads, Medusa
from springtide.errors import SpringtideError
from springtide.model.stack import Stack
from tiny import BASE, tiny

HIDDEN, VOCAB = BASE["hidden_size"], BASE["vocab_size"]
LAYOUTS = ("springtide", "original", "vllm")
FILES = {"springtide": "model.safetensors", "original": "medusa_lm_head.pt", "vllm": "model.safetensors"}


class ResBlock(nn.Module):
    """The original project's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.act = nn.SiLU()

    def forward(self, x):
        return x + self.act(self.linear(x))


def original_heads(heads=3, layers=1):
    """As the original project builds them: a list of sequences of blocks and a linear layer."""
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(*(ResBlock() for _ in range(layers)), nn.Linear(HIDDEN, VOCAB, bias=False)) for _ in range(heads)
    )


class VllmHeads(nn.Module):
    """As vLLM builds them from ``config.json``."""

    class Block(nn.Module):
        def __init__(self, config):
            super().__init__()
            size, bias = config["hidden_size"], config.get("medusa_fc_bias", False)
            self.layers = nn.ModuleList(nn.Linear(size, size, bias) for _ in range(config["num_hidden_layers"]))

        def forward(self, x):
            for layer in self.layers:
                x = x + nn.functional.silu(layer(x))
            return x

    def __init__(self, config):
        super().__init__()
        assert config["model_type"] == "medusa" and config["architectures"] == ["MedusaModel"]
        assert config["truncated_vocab_size"] == config["vocab_size"]
        self.blocks = nn.ModuleList(self.Block(config) for _ in range(config["num_heads"]))
        count = 1 if config.get("original_lm_head") else config["num_heads"]
        self.lm_heads = nn.ModuleList(
            nn.Linear(config["hidden_size"], config["vocab_size"], bias=False) for _ in range(count)
        )

    def forward(self, x):
        heads = [*self.lm_heads] * (len(self.blocks) // len(self.lm_heads))
        return torch.stack([head(block(x)) for head, block in zip(heads, self.blocks, strict=True)])


def random_drafter(layers=1, shared=False, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return (0.3 * torch.randn(shape, generator=generator)).to(dtype)

    lm_heads = None if shared else random(3, VOCAB, HIDDEN)
    return Medusa(Heads(random(layers, 3, HIDDEN, HIDDEN), random(layers, 3, HIDDEN), lm_heads), VOCAB)


@torch.inference_mode()
def logits(drafter, head=None):
    """What the heads guess for a few hidden states, in fp64 so that only the weights make a difference."""
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return drafter.heads.double()(hidden, head) if isinstance(drafter, Medusa) else drafter.double()(hidden)


def write_original(folder, heads, file="medusa_lm_head.pt", **config):
    folder.mkdir(parents=True, exist_ok=True)
    state = heads.state_dict()
    torch.save(state, folder / file) if file.endswith(".pt") else save_file(state, folder / file)
    layers = len(heads[0]) - 1
    settings = {"base_model_name_or_path": "org/base", "medusa_num_heads": len(heads), "medusa_num_layers": layers}
    (folder / "config.json").write_text(json.dumps(settings | config))


# Reading


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors"])
def test_a_checkpoint_of_the_original_project(tmp_path, file, layers):
    heads = original_heads(3, layers)
    write_original(tmp_path, heads, file)
    drafter = Medusa.load(tmp_path)
    hidden = torch.randn(4, HIDDEN)
    with torch.inference_mode():
        torch.testing.assert_close(drafter.heads(hidden, None), torch.stack([head(hidden) for head in heads]))
    assert (drafter.vocab_size, drafter.base, drafter.base_model) == (VOCAB, None, "org/base")


def test_the_weights_say_how_many_heads_there_are(tmp_path):
    write_original(tmp_path, original_heads(5), medusa_num_heads=2)
    assert Medusa.load(tmp_path).heads.count == 5


def test_blocks_that_are_one_and_the_same_module(tmp_path):
    """The original project multiplies a list of one block."""
    block = ResBlock()
    write_original(tmp_path, nn.ModuleList([nn.Sequential(block, block, nn.Linear(HIDDEN, VOCAB, bias=False))]))
    heads = Medusa.load(tmp_path).heads
    assert heads.weight.shape[:2] == (2, 1) and (heads.weight[0] == heads.weight[1]).all()


def test_vllms_heads_without_bias(tmp_path):
    config = {"model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": HIDDEN, "vocab_size": VOCAB}
    config |= {"truncated_vocab_size": VOCAB, "num_heads": 2, "num_hidden_layers": 2}
    heads = VllmHeads(config)
    save_file(heads.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(Medusa.load(tmp_path)), logits(heads))


# Writing


@pytest.mark.parametrize("layers", [1, 2])
def test_any_layout_to_any_other_and_back(tmp_path, layers):
    drafter = random_drafter(layers)
    expected = logits(random_drafter(layers))
    for first in LAYOUTS:
        drafter.save(tmp_path / first, first)
        for second in LAYOUTS:
            Medusa.load(tmp_path / first).save(tmp_path / first / second, second)
            assert (logits(Medusa.load(tmp_path / first / second)) == expected).all()
            assert {path.name for path in (tmp_path / first / second).iterdir()} == {"config.json", FILES[second]}


def test_the_original_project_reads_what_is_written_for_it(tmp_path):
    random_drafter(2).save(tmp_path, "original")
    heads = original_heads(3, 2)
    heads.load_state_dict(torch.load(tmp_path / "medusa_lm_head.pt", weights_only=True))
    expected = logits(random_drafter(2))
    for head, own in zip(heads.double(), expected, strict=True):
        hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        torch.testing.assert_close(head(hidden), own)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"base_model_name_or_path": "", "medusa_num_heads": 3, "medusa_num_layers": 2}


@pytest.mark.parametrize("shared", [False, True])
def test_vllm_reads_what_is_written_for_it(tmp_path, shared):
    stack = Stack(tiny("qwen3", torch.bfloat16))
    drafter = random_drafter(2, shared).resolve(stack)
    drafter.save(tmp_path, "vllm")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "truncated_vocab_size": VOCAB,
        "num_heads": 3,
        "num_hidden_layers": 2,
        "medusa_fc_bias": True,
        "original_lm_head": shared,
    }
    heads = VllmHeads(config)
    heads.load_state_dict(load_file(tmp_path / "model.safetensors"))
    own = stack.model.lm_head.weight.double()
    torch.testing.assert_close(logits(heads), logits(random_drafter(2, shared), lambda x: x @ own.T))


@pytest.mark.parametrize("layout", ["original", "vllm"])
def test_a_shared_lm_head_is_the_targets(tmp_path, layout):
    with pytest.raises(SpringtideError, match=r"use their model's LM head, .*--model"):
        random_drafter(shared=True).save(tmp_path / "unknown", layout)
    assert not (tmp_path / "unknown").exists()
    stack = Stack(tiny("qwen3", torch.bfloat16))
    random_drafter(shared=True).resolve(stack).save(tmp_path, layout)
    own = stack.model.lm_head.weight.double()
    read = Medusa.load(tmp_path)
    assert (read.heads.lm_heads is None) == (layout == "vllm"), "the original layout cannot say so"
    torch.testing.assert_close(
        logits(read, lambda x: x @ own.T), logits(random_drafter(shared=True), lambda x: x @ own.T)
    )


def test_springtides_layout_keeps_everything(tmp_path):
    heads, accuracy = random_drafter().heads, [[0.5, 0.25], [0.4, 0.0], [0.1, 0.1]]
    Medusa(heads, VOCAB, base="0123456789abcdef", base_model="org/base", accuracy=accuracy).save(tmp_path)
    config, tensors = read_folder(tmp_path)
    assert config == {
        "drafter": "medusa",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "base": "0123456789abcdef",
        "base_model": "org/base",
        "accuracy": accuracy,
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    read = Medusa.load(tmp_path)
    assert (read.base, read.base_model, read.accuracy) == ("0123456789abcdef", "org/base", accuracy)


# Files that are wrong


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rename(folder, old, new):
    state = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    tensor = state.pop(old)
    torch.save(state | ({new: tensor} if new else {}), folder / "medusa_lm_head.pt")


def change(folder, name, tensor):
    state = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    torch.save(state | {name: tensor}, folder / "medusa_lm_head.pt")


FAULTS = {
    "no folder": (lambda f: [path.unlink() for path in f.iterdir()], "holds no config.json"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "is broken"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is broken"),
    "no layout": (
        lambda f: (f / "config.json").write_text("{}"),
        r"in a known layout \(springtide, original, vllm\); give",
    ),
    "no weights": (lambda f: (f / "medusa_lm_head.pt").unlink(), "medusa_lm_head.pt"),
    "cut short": (lambda f: (f / "medusa_lm_head.pt").write_bytes(b"PK\x03\x04"), "is broken"),
    "code": (lambda f: torch.save({"0.0.linear.weight": Evil()}, f / "medusa_lm_head.pt"), "is broken"),
    "no tensors": (lambda f: torch.save([1], f / "medusa_lm_head.pt"), "is broken"),
    "nothing": (lambda f: torch.save({}, f / "medusa_lm_head.pt"), "lacks '0.0.linear.weight'"),
    "missing": (lambda f: rename(f, "1.1.weight", None), "lacks '1.1.weight'"),
    "unknown": (lambda f: rename(f, "1.0.linear.bias", "token_map"), "lacks '1.0.linear.bias'"),
    "too much": (lambda f: change(f, "token_map", torch.zeros(3)), "holds 'token_map', which is no part"),
    "sizes": (lambda f: change(f, "1.1.weight", torch.zeros(5, HIDDEN)), "heads of different sizes"),
    "NaN": (lambda f: change(f, "2.1.weight", torch.full((VOCAB, HIDDEN), torch.nan)), "'2.1.weight' in .* holds NaN"),
    "widths": (lambda f: [change(f, f"{i}.0.linear.bias", torch.zeros(5)) for i in range(3)], "whose parts fit"),
}


@pytest.mark.parametrize(("spoil", "sentence"), FAULTS.values(), ids=FAULTS.keys())
def test_unsound_files_are_refused(tmp_path, monkeypatch, spoil, sentence):
    monkeypatch.chdir(tmp_path)
    write_original(tmp_path / "heads", original_heads())
    spoil(tmp_path / "heads")
    with pytest.raises(SpringtideError, match=sentence) as caught:
        Medusa.load(tmp_path / "heads")
    assert str(caught.value).count(".\n") == 0 and not Path("evil").exists()


OWN_FAULTS = {
    "no vocabulary": lambda f: edit(f, vocab_size=...),
    "another vocabulary": lambda f: edit(f, vocab_size=5),
    "another size": lambda f: edit(f, hidden_size=5),
    "too few accuracies": lambda f: edit(f, accuracy=[[0.5]]),
    "accuracies that are none": lambda f: edit(f, accuracy=[["a"], [0.5], [2]]),
    "other tensors": lambda f: save_file({"weight": torch.zeros(3)}, f / "model.safetensors"),
    "tensors of other sizes": lambda f: save_file(
        {"weight": torch.zeros(1, 3, 5, 5), "bias": torch.zeros(1, 3, 5)}, f / "model.safetensors"
    ),
}


@pytest.mark.parametrize("spoil", OWN_FAULTS.values(), ids=OWN_FAULTS.keys())
def test_parts_that_contradict_each_other_are_refused(tmp_path, spoil):
    random_drafter().save(tmp_path)
    edit(tmp_path, accuracy=[[0.5], [0.5], [0.5]])
    Medusa.load(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SpringtideError, match="holds no medusa drafter whose parts fit together"):
        Medusa.load(tmp_path)


def test_broken_safetensors_are_refused(tmp_path):
    random_drafter().save(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(SpringtideError, match="is broken"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SpringtideError, match=r"holds no model\.safetensors"):
        read_folder(tmp_path)


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(SpringtideError, match="choose one of springtide, original, vllm"):
        random_drafter().save(tmp_path, "gguf")


# Files that are whole


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_nothing_is_replaced_unless_all_is_written(tmp_path, monkeypatch, error):
    random_drafter().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path):
        path.write_text("half")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("springtide.drafting.folder.save_file", fail)
        with pytest.raises(SpringtideError, match=r"cannot be written \(No space left"):
            random_drafter(2).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not tmp_path.with_name(f"{tmp_path.name}.writing").exists()
    random_drafter(2).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and Medusa.load(tmp_path).heads.weight.shape[0] == 2


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpringtideError, match="cannot be written"):
        write_folder(tmp_path / "file", {}, {})


# The verb


def convert(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["springtide", "convert", "medusa", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_convert(tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "a", original_heads())
    assert convert(monkeypatch, "--from", tmp_path / "a", "--to", tmp_path / "b", "--format", "vllm") == 0
    assert convert(monkeypatch, "--from", tmp_path / "b", "--to", tmp_path / "c", "--format", "springtide") == 0
    assert convert(monkeypatch, "--from", tmp_path / "c", "--to", tmp_path / "d", "--format", "original") == 0
    heads = original_heads().bfloat16().state_dict()
    found = torch.load(tmp_path / "d" / "medusa_lm_head.pt", weights_only=True)
    assert found.keys() == heads.keys() and all((found[name] == heads[name]).all() for name in heads)
    assert capsys.readouterr().err == ""


def test_convert_does_not_overwrite(tmp_path, monkeypatch, capsys):
    write_original(tmp_path, original_heads())
    assert convert(monkeypatch, "--from", tmp_path, "--to", tmp_path, "--format", "vllm") == 2
    assert "holds a config.json already; choose another folder for --to" in capsys.readouterr().err


def test_what_is_no_medusa_drafter_is_not_converted(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"drafter": "hidden-transfer"}')
    assert convert(monkeypatch, "--from", tmp_path, "--to", tmp_path / "b", "--format", "vllm") == 2
    assert "holds no Medusa heads in a known layout" in capsys.readouterr().err


def test_convert_for_a_model(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(1)
    heads = Heads(torch.zeros(1, 2, 128, 128), torch.randn(1, 2, 128, generator=generator), None)
    Medusa(heads, 2048).save(tmp_path / "a")
    arguments = ("--from", tmp_path / "a", "--format", "original")
    assert convert(monkeypatch, *arguments, "--to", tmp_path / "b") == 2
    assert "use their model's LM head" in capsys.readouterr().err
    assert convert(monkeypatch, *arguments, "--to", tmp_path / "b", "--model", "pocket") == 0
    read = Medusa.load(tmp_path / "b")
    assert read.base_model == "pocket" and read.heads.lm_heads.shape == (2, 2048, 128)
    random_drafter().save(tmp_path / "other")
    assert convert(monkeypatch, "--from", tmp_path / "other", "--to", tmp_path / "c", "--format", "vllm",
                   "--model", "pocket") == 2  # fmt: skip
    assert "is for a model with hidden states of size 32" in capsys.readouterr().err


def test_convert_tells_of_an_adapter(tmp_path, monkeypatch, capsys):
    random_drafter().save(tmp_path / "a")
    (tmp_path / "a" / "adapter").mkdir()
    assert convert(monkeypatch, "--from", tmp_path / "a", "--to", tmp_path / "b", "--format", "vllm") == 0
    assert "these heads are for the model with" in capsys.readouterr().err
