"""What rows cost is measured once and then known."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from springtide.engine.engine import Engine
from springtide.model import cost
from springtide.model.cost import ROWS, cost_of_rows, lines
from tiny import tiny


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Where costs are kept."""
    path = tmp_path / "cache" / "costs.json"
    monkeypatch.setattr(cost, "place", lambda: path)
    return path


@pytest.fixture
def measured(monkeypatch):
    """How often costs were measured."""
    calls = []

    def measure(stack, policy):
        calls.append(policy)
        return [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0]

    monkeypatch.setattr(cost, "measure", measure)
    return calls


def of(engine: Engine):
    return cost_of_rows(engine.stack, engine.policy)


@pytest.mark.parametrize("policy", ["dense", "streaming:budget=64"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_passes_are_timed(name, policy):
    engine = Engine(tiny(name), policy=policy)
    found = cost.measure(engine.stack, engine.policy)
    assert len(found) == len(ROWS)
    assert found[0] > 0 and found == sorted(found)


@pytest.mark.parametrize("limit", [16, 100])
def test_a_model_with_a_short_context(limit):
    engine = Engine(tiny("qwen3", max_position_embeddings=limit))
    assert of(engine)(1) > 0


def test_costs_are_measured_once_and_kept(measured, kept):
    engine = Engine(tiny("qwen3"))
    assert of(engine)(4) == of(engine)(4) == of(Engine(tiny("qwen3")))(4) == 1.5
    assert len(measured) == 1
    assert json.loads(kept.read_text()) == {cost.key(engine.stack, engine.policy): [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0]}
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_what_changes_the_cost_is_measured_again(measured, monkeypatch):
    of(Engine(tiny("qwen3")))
    for other in (
        Engine(tiny("llama")),
        Engine(tiny("qwen3", torch.bfloat16)),
        Engine(tiny("qwen3", num_hidden_layers=3)),
        Engine(tiny("qwen3"), policy="streaming:budget=64"),
    ):
        before = len(measured)
        of(other)
        assert len(measured) == before + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    of(Engine(tiny("qwen3")))
    assert len(measured) == 6
    monkeypatch.setattr("springtide.__version__", "99")
    of(Engine(tiny("qwen3")))
    assert len(measured) == 7


@pytest.mark.parametrize("content", ["", "{", "[]", "KEY: 3", '{"KEY": [1.0]}', '{"KEY": "fast"}', "\xff"])
def test_a_broken_file_is_replaced(measured, kept, content):
    engine = Engine(tiny("qwen3"))
    kept.parent.mkdir()
    kept.write_bytes(content.replace("KEY", cost.key(engine.stack, engine.policy)).encode("latin-1"))
    assert of(engine)(1) == of(engine)(1) == 1.0
    assert len(measured) == 1


def test_others_costs_stay(measured, kept):
    kept.parent.mkdir()
    kept.write_text('{"another": [1.0]}')
    of(Engine(tiny("qwen3")))
    assert len(json.loads(kept.read_text())) == 2


def test_where_nothing_can_be_kept(measured, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    engine = Engine(tiny("qwen3"))
    assert of(engine)(1) == of(engine)(1) == 1.0
    assert len(measured) == 2


def test_straight_lines_through_the_points():
    value = lines((1, 2, 4), (1.0, 3.0, 4.0))
    assert [value(x) for x in (1, 1.5, 2, 3, 4)] == [1.0, 2.0, 3.0, 3.5, 4.0]
    assert [value(x) for x in (6, 0.5)] == [5.0, 0.0]


def test_two_at_once(measured, kept):
    """Whoever comes last, the file is whole."""
    engines = [Engine(tiny(name)) for name in ("qwen3", "llama", "olmo2")]
    threads = [threading.Thread(target=of, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(kept.read_text())
