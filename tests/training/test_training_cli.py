"""`springtide train` and `springtide distill` as a user meets them."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import replace

import pytest

from folders import BOOK, VOCAB
from springtide.engine.drafters import find_drafter
from springtide.training import distill
from springtide.training.trainer import Trainer

FIELDS = ["drafter", "parameters", "tokens", "seconds", "held_out_tokens", "accuracy"]
SMALL = ["--steps", 3, "--batch", 2, "--length", 32]


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    path = tmp_path_factory.mktemp("books")
    for number in range(3):
        part = BOOK[number * 4000 : (number + 1) * 4000]
        (path / f"{number}.txt").write_text(part, encoding="utf-8")
    return path


@pytest.fixture
def train(run, folder, books, tmp_path):
    """Train a drafter in ``tmp_path / "out"``; returns its result as JSON, or what the command refused."""

    def train(verb, *arguments, data=("--data", books, "--hold-out", "1.txt")):
        small = [] if "--steps" in arguments else SMALL
        result = run(
            *("train", verb, "--model", folder, "--out", tmp_path / "out", "--json", tmp_path / "out.json"),
            *(*data, *small, *arguments),
        )
        if result.code:
            return result
        assert "top-5" in result.out and f"use it with --draft {tmp_path / 'out'}" in result.out
        content = json.loads((tmp_path / "out.json").read_text())
        assert list(content) == FIELDS
        assert all(0 <= share <= 1 for step in content["accuracy"] for share in step)
        return content

    return train


@pytest.mark.parametrize(
    ("verb", "options", "drafter", "steps", "parameters"),
    [
        ("medusa", [], "medusa", 3, 3 * (32 * 32 + 32 + VOCAB * 32)),
        ("medusa", ["--shared", "--heads", 2], "medusa", 2, 2 * (32 * 32 + 32)),
        ("medusa2", ["--distilled"], "medusa2", 3, None),
        ("hidden-transfer", ["--layers", "1+3"], "hidden-transfer", 2, 2 * (32 * 32 + 32)),
        ("longspec", ["--steps-ahead", 3], "longspec", 3, 5 * 32 * 32 + 3 * 32 * 48 + 4 * 32),
        ("longspec", ["--positions", "gaps", "--max-length", 128], "longspec", 4, None),
    ],
)
def test_train(train, run, folder, tmp_path, verb, options, drafter, steps, parameters):
    result = train(verb, *options)
    assert (result["drafter"], len(result["accuracy"])) == (drafter, steps)
    assert parameters in (None, result["parameters"])
    assert result["tokens"] == 3 * 2 * 32
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {"adapter"} == {"checkpoint.pt", "log.jsonl", "curves.png", "config.json", "model.safetensors"}
    assert ("adapter" in names) == (verb == "medusa2")
    accuracy = find_drafter(tmp_path / "out", folder).accuracy
    assert accuracy == result["accuracy"]
    text = run("generate", "The ship", "--model", folder, "--draft", tmp_path / "out", "--max-tokens", 8)
    assert text.code == 0 and ("adapter is merged" in text.err if drafter == "medusa2" else text.err == "")


def test_transfers_are_spread_over_the_upper_half(train, folder, tmp_path):
    train("hidden-transfer", "--steps-ahead", 2)
    assert find_drafter(tmp_path / "out", folder).layers == (2, 3)


def test_training_goes_on_from_a_drafter(train, folder, tmp_path):
    first = train("longspec", "--positions", "plain")
    (tmp_path / "out").rename(tmp_path / "first")
    assert find_drafter(tmp_path / "first", folder).trained == 32
    second = train("longspec", "--start-from", tmp_path / "first")
    assert find_drafter(tmp_path / "out", folder).trained == 1024
    assert second["parameters"] == first["parameters"]
    train("longspec", "--start-from", tmp_path / "first", "--steps-ahead", 2).refused(
        "--steps-ahead is 2, but the drafter of --start-from guesses 4; leave one out"
    )
    train("longspec").refused("belongs to another --start-from")
    train("longspec", "--start-from", folder).refused("holds no longspec drafter")


def test_data_that_the_model_writes_itself(train, run, folder, books, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "SELF", replace(distill.SELF, max_tokens=20))
    result = train("medusa", "--prompts", 4, "--text", books / "0.txt", data=[])
    lines = [json.loads(line) for line in (tmp_path / "out" / "self.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(len(line["tokens"]) <= line["prompt"] + 20 for line in lines)
    assert result["held_out_tokens"] == 32
    monkeypatch.setattr(Trainer, "step", lambda _: pytest.fail("worked"))
    again = train("medusa", "--prompts", 4, "--text", books / "0.txt", data=[])
    assert again["accuracy"] == result["accuracy"]


def test_ctrl_c_and_the_same_command(train, tmp_path, monkeypatch, caplog):
    step = Trainer.step

    def step_and_interrupt(self):
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_interrupt)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            result = train("medusa")
        finally:
            signal.signal(signal.SIGINT, before)
    assert result.code == 130
    assert result.err.endswith(f"\nStopped; the same command goes on from {tmp_path / 'out'}.\n")
    assert "Traceback" not in result.err
    assert not (tmp_path / "out.json").exists()
    caplog.set_level(logging.INFO)
    train("medusa")
    assert "continuing at step 2 of 3" in caplog.text


def test_a_checkpoint_of_other_options(train):
    train("medusa")
    for changed, message in (
        (["--heads", 2], "belongs to another --heads"),
        (["--shared"], "belongs to another --full"),
        (["--steps", 4, "--batch", 2, "--length", 32], "belongs to another --steps"),
        (["--steps", 3, "--batch", 2, "--length", 64], "belongs to another data set"),
    ):
        train("medusa", *changed).refused(message, "choose another --out folder")


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("medusa", ["--data", "nosuch.txt"], "'nosuch.txt' cannot be read"),
        ("medusa", ["--data", "a.jsonl"], "'a.jsonl', line 2, is no document"),
        ("medusa", ["--data", "a.txt"], "'a.txt' gives 2 tokens, but 2 windows of 32 are needed"),
        ("medusa", ["--data", "a.txt", "--text", "a.txt"], "--text is what `--data self` begins with"),
        ("medusa", ["--text", "nosuch.txt"], "'nosuch.txt' cannot be read"),
        ("medusa", ["--data", "b.txt", "--length", 4], "Windows of 4 tokens are too short"),
        ("medusa", ["--data", "b.txt", "--hold-out", "c.txt"], "--hold-out names files of a folder"),
        ("medusa", ["--data", "b.txt", "--json", "no/such/out.json"], "there is no folder"),
        (
            "medusa",
            ["--data", "b.txt", "--out", "a.txt"],
            "'a.txt' cannot be made a folder (File exists); choose another --out",
        ),
        ("hidden-transfer", ["--data", "b.txt", "--layers", "2,3"], "--layers is '2,3', but it must be whole numbers"),
        (
            "hidden-transfer",
            ["--data", "b.txt", "--layers", "1+3", "--steps-ahead", "3"],
            "--layers is '1+3', but --steps-ahead is 3; give a layer for each step",
        ),
        ("hidden-transfer", ["--data", "b.txt", "--layers", "3+2"], "must ascend, from 0 to 3 at most"),
        ("hidden-transfer", ["--data", "b.txt", "--layers", "2+4"], "must ascend, from 0 to 3 at most"),
        ("longspec", ["--data", "b.txt", "--max-length", "31"], "--max-length is 31, but windows have 32 tokens"),
        ("longspec", ["--data", "b.txt", "--max-length", "2000"], "--max-length is 2000, but the model's context is"),
        ("longspec", ["--data", "b.txt", "--positions", "plain", "--max-length", "64"], "leave out --max-length"),
        ("longspec", ["--data", "b.txt", "--start-from", "nosuch"], "'nosuch' holds no config.json"),
    ],
)
def test_mistakes(run, folder, tmp_path, monkeypatch, verb, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": 3}\n')
    (tmp_path / "a.txt").write_text("Hm")
    (tmp_path / "b.txt").write_text(BOOK[:4000])
    run("train", verb, "--model", folder, "--out", "out", *SMALL, *options).refused(message)
    assert not any((tmp_path / "out").glob("*"))


def test_distill(run, folder, books, tmp_path):
    out = tmp_path / "out.jsonl"
    base = ["distill", "--model", folder, "--data", books, "--hold-out", "2.txt", "--out", out]
    base += ["--length", 16, "--max-tokens", 8, "--batch", 3, "--facts", 0.3, "--temperature", 0.5]
    result = run(*base, "--prompts", 4)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    tokens, own = (sum(len(x["tokens"]) - x["prompt"] * part for x in lines) for part in (0, 1))
    assert (result.code, result.err) == (0, "") and 0 < own <= 32
    assert result.out == f"'{out}' holds 4 texts of {tokens} tokens, of which the model wrote {own}.\n"
    first = out.read_text()
    assert "holds 6 texts" in run(*base, "--prompts", 6).out
    assert out.read_text().startswith(first)
    run(*base, "--prompts", 6, "--seed", 1).refused("holds something else", "choose another --out")
    run(*base, "--facts", 2).refused("--facts is a share between 0 and 1")
    run(*base, "--policy", "fast").refused("Unknown policy 'fast'")
    run(*base[:-2], "--out", tmp_path / "no" / "out.jsonl").refused("there is no folder")
    run(*base, "--out", books).refused("cannot be written")


def test_an_interrupted_distillation(run, folder, books, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("springtide.training.distill.distill", interrupted)
    result = run("distill", "--model", folder, "--data", books, "--out", tmp_path / "out.jsonl")
    assert (result.code, result.err) == (
        130,
        f"\nStopped; the same command goes on from {tmp_path / 'out.jsonl'}.\n",
    )
