"""The demonstration, with a model that knows nothing."""

from __future__ import annotations

import json

from folders import BOOK, VOCAB, tokenizer
from springtide.engine.engine import Engine
from springtide.evaluation import demo
from tiny import tiny

LAYERS = {"version": 2, "tidal": {"full": [0], "select": [1]}}


def engine():
    return Engine(tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer(), calibration=LAYERS)


def test_demo(monkeypatch, capsys):
    monkeypatch.setattr(demo, "LENGTH", 400)
    result = demo.demo(engine(), BOOK)
    json.dumps(result)
    assert [row["depth"] for row in result["answers"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert [row["policy"] for row in result["summary"]] == ["dense", "tidal, budget 256"]
    shown = capsys.readouterr().out
    assert all(row["question"].split()[-1] in shown for row in result["answers"])


def test_answers_are_shown_as_they_are(monkeypatch, capsys):
    """Text in brackets is no markup."""
    monkeypatch.setattr(demo, "LENGTH", 400)
    run = Engine.run

    def bracketed(self, sequences):
        yield from run(self, sequences)
        for sequence in sequences:
            sequence.writer.text = "[/red] [bold]x"

    monkeypatch.setattr(Engine, "run", bracketed)
    demo.demo(engine(), BOOK)
    assert capsys.readouterr().out.count("[/red] [bold]x") == 10
