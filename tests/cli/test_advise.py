"""``springtide advise``."""

from __future__ import annotations

import json

import pytest

from folders import save_model
from springtide.cli import show
from springtide.engine.engine import Engine

FIELDS = [
    *("context", "policy", "draft", "lossless", "prompts", "acceptance_length", "rows_per_pass", "outputs_equal"),
    *("draft_ms", "verify_ms", "dense_ms", "predicted_speedup", "ms_per_token", "speedup", "complete"),
]


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("springtide.benchmarks.advise.PASSES", 1)


@pytest.mark.usefixtures("quick")
def test_advise(run, folder, book, tmp_path):
    result = run(
        *("advise", "--model", folder, "--text", book, "--context", "320,300", "--prompts", 1, "--max-tokens", 6),
        *("--policy", "streaming:budget=64", "--draft", "lookup,lookup:tokens=6", "--json", tmp_path / "out.json"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert all(list(row) == FIELDS and row["complete"] for row in rows)
    assert [(row["context"], row["policy"], row["draft"], row["lossless"]) for row in rows] == [
        (context, policy, draft, policy == "dense")
        for context in (300, 320)
        for policy in ("dense", "streaming:budget=64")
        for draft in ("none", "lookup", "lookup:tokens=6")
    ]
    kept = json.loads((folder / "advice.json").read_text())
    for each in kept["contexts"]:
        own = [row for row in rows if row["context"] == each["context"]]
        for name, group in (("lossless", [row for row in own if row["lossless"]]), ("fastest", own)):
            best = min(group, key=lambda row: row["ms_per_token"])
            assert each[name] == {key: best[key] for key in ("policy", "draft", "ms_per_token", "speedup")}
    advised = {each["lossless"]["draft"] for each in kept["contexts"]} - {"none"}
    assert set(kept["drafters"]) <= advised and len(kept["drafters"]) == bool(advised)
    assert "After 300 tokens: " in result.out and "After 320 tokens: " in result.out
    assert f"{folder / 'advice.json'}: --draft auto takes {', '.join(kept['drafters']) or 'none'}." in " ".join(
        result.out.split()
    )
    again = run("generate", "Hi", "--model", folder, "--draft", "auto", "--max-tokens", 4)
    assert again.code == 0 and again.out == run("generate", "Hi", "--model", folder, "--max-tokens", 4).out


@pytest.mark.usefixtures("quick")
def test_what_is_left_out_by_default_is_said(run, folder, book):
    result = run("advise", "--model", folder, "--text", book, "--context", 300, "--prompts", 1, "--max-tokens", 6)
    assert (result.code, result.err) == (0, "") and "lookup:tokens=6" in result.out
    assert "The model is not calibrated, so that tidal and self were left out; run `springtide calibrate`" in result.out


@pytest.mark.usefixtures("quick")
def test_an_interrupt_keeps_what_was_measured_and_advises_nothing(run, folder, book, tmp_path, monkeypatch):
    bar = show._bar

    class Interrupted:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(show, "_bar", lambda total, what: (Interrupted if what == "prompts" else bar)(total, what))
    result = run(
        *("advise", "--model", folder, "--text", book, "--context", 300, "--prompts", 2, "--max-tokens", 6),
        *("--draft", "lookup", "--json", tmp_path / "out.json"),
    )
    assert result.code == 130 and result.err.startswith("\nStopped; these are the results of 1 of 2 prompts")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["draft"], row["prompts"], row["complete"]) for row in rows] == [
        ("none", 1, False),
        ("lookup", 1, False),
    ]
    assert "lookup" in result.out and "After" not in result.out
    assert not (folder / "advice.json").exists()


def test_an_interrupt_before_anything_was_measured(run, folder, book, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "read", interrupted)
    command = ["advise", "--model", folder, "--text", book, "--context", 300, "--prompts", 1]
    result = run(*command, "--json", tmp_path / "out.json")
    assert (result.code, result.out) == (130, "")
    assert not (tmp_path / "out.json").exists() and not (folder / "advice.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "1020"], "A context of 1020 tokens and 96 more are beyond the model's context of 1024; give a"),
        (["--context", "long"], "--context is 'long', but it must be whole numbers joined by commas"),
        (["--context", "0"], "--context must be at least 1, not 0"),
        (["--context", "300", "--draft", "nosuch"], "There is no drafter 'nosuch': choose lookup"),
        (["--context", "300", "--draft", "medusa"], "There is no drafter 'medusa' beside this model"),
        (["--context", "300", "--draft", "EMPTY"], "holds no"),
        (["--context", "300", "--draft", "auto"], "--draft names 'auto', but each drafter is measured by itself"),
        (["--context", "300", "--draft", ""], "--draft names no drafter"),
        (["--context", "300", "--policy", "fast"], "Unknown policy 'fast'"),
        (["--context", "300", "--text", "SHORT"], "The text has 2 tokens, but a prompt needs 300; give a longer text"),
        (["--context", "300", "--temperature", "-1"], "--temperature must be 0 (greedy) or more"),
    ],
)
def test_what_does_not_do(run, folder, tmp_path, options, message):
    (tmp_path / "short.txt").write_text("Hm")
    (tmp_path / "empty").mkdir()
    places = {"SHORT": tmp_path / "short.txt", "EMPTY": tmp_path / "empty"}
    run("advise", "--model", folder, *(places.get(option, option) for option in options)).refused(message)
    assert not (folder / "advice.json").exists()
