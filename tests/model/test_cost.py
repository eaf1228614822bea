"""What rows cost is measured once and then known, until passes take another time."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from itertools import accumulate, chain
from types import SimpleNamespace

import pytest
import torch

from springtide.engine.engine import Engine
from springtide.model import cost
from springtide.model.cost import ROWS, cost_of_rows, lines
from tiny import tiny

COSTS = [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0]


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Where costs are kept."""
    path = tmp_path / "cache" / "costs.json"
    monkeypatch.setattr(cost, "place", lambda: path)
    return path


@dataclass
class Machine:
    """Where passes take ``costs``, times ``busy``; they were ``measured`` and ``checked`` so often."""

    costs: dict[int, float] = field(default_factory=lambda: dict(zip(ROWS, COSTS, strict=True)))
    busy: float = 1.0
    measured: int = 0
    checked: int = 0

    def measure(self, stack, policy, counts=ROWS, passes=cost.PASSES):
        self.measured += counts == ROWS
        self.checked += counts != ROWS
        return [self.busy * self.costs[rows] for rows in counts]


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(cost, "measure", machine.measure)
    return machine


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


def test_costs_are_measured_once_and_kept(machine, kept):
    engine = Engine(tiny("qwen3"))
    assert of(engine)(4) == of(engine)(4) == of(Engine(tiny("qwen3")))(4) == 1.5
    assert machine.measured == 1
    assert json.loads(kept.read_text()) == {cost.key(engine.stack, engine.policy): COSTS}
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize(("before", "after"), [(2.0, 1.0), (1.3, 1.0), (1.0, 1.3), (1.0, 10.0)])
def test_what_a_busy_machine_measured_is_measured_again(machine, kept, before, after):
    engine = Engine(tiny("qwen3"))
    machine.busy = before
    assert of(engine)(4) == 1.5 * before
    machine.busy = after
    assert of(engine)(4) == of(engine)(4) == 1.5 * after
    assert (machine.measured, machine.checked) == (2, cost.CHECKS + 1)
    assert list(json.loads(kept.read_text()).values()) == [[after * taken for taken in COSTS]]


@pytest.mark.parametrize("busy", [0.85, 1.15])
def test_what_is_nearly_so_stays(machine, busy):
    engine = Engine(tiny("qwen3"))
    of(engine)
    machine.busy = busy
    assert of(engine)(4) == 1.5
    assert (machine.measured, machine.checked) == (1, 1)


def test_a_slow_moment_is_no_reason(machine, monkeypatch):
    engine, passes = Engine(tiny("qwen3")), iter([3.0, 1.4, 1.0])
    of(engine)

    def measure(*args, **options):
        machine.busy = next(passes)
        return machine.measure(*args, **options)

    monkeypatch.setattr(cost, "measure", measure)
    assert of(engine)(4) == 1.5
    assert machine.measured == 1


@pytest.mark.parametrize("rows", cost.CHECKED)
def test_few_rows_and_many_are_checked(machine, rows):
    engine = Engine(tiny("qwen3"))
    of(engine)
    machine.costs[rows] *= 1.5
    assert of(engine)(rows) == machine.costs[rows]
    assert machine.measured == 2


def test_the_best_of_several_passes_counts(monkeypatch):
    engine = Engine(tiny("qwen3"))
    seconds = [3.0, 9.0, 1.0, 5.0, 7.0, 4.0, 2.0, 8.0]  # of 1 and 16 rows by turns
    ticks = accumulate(chain.from_iterable((10.0, own) for own in seconds))
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=ticks.__next__))
    assert cost.measure(engine.stack, engine.policy, (1, 16), passes=4) == [1000.0, 4000.0]


def test_what_changes_the_cost_is_measured_again(machine, monkeypatch):
    of(Engine(tiny("qwen3")))
    for other in (
        Engine(tiny("llama")),
        Engine(tiny("qwen3", torch.bfloat16)),
        Engine(tiny("qwen3", num_hidden_layers=3)),
        Engine(tiny("qwen3"), policy="streaming:budget=64"),
    ):
        before = machine.measured
        of(other)
        assert machine.measured == before + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    of(Engine(tiny("qwen3")))
    assert machine.measured == 6
    monkeypatch.setattr("springtide.__version__", "99")
    of(Engine(tiny("qwen3")))
    assert machine.measured == 7


@pytest.mark.parametrize("content", ["", "{", "[]", "KEY: 3", '{"KEY": [1.0]}', '{"KEY": "fast"}', "\xff"])
def test_a_broken_file_is_replaced(machine, kept, content):
    engine = Engine(tiny("qwen3"))
    kept.parent.mkdir()
    kept.write_bytes(content.replace("KEY", cost.key(engine.stack, engine.policy)).encode("latin-1"))
    assert of(engine)(1) == of(engine)(1) == 1.0
    assert machine.measured == 1


def test_others_costs_stay(machine, kept):
    kept.parent.mkdir()
    kept.write_text('{"another": [1.0]}')
    of(Engine(tiny("qwen3")))
    assert len(json.loads(kept.read_text())) == 2


def test_where_nothing_can_be_kept(machine, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    engine = Engine(tiny("qwen3"))
    assert of(engine)(1) == of(engine)(1) == 1.0
    assert machine.measured == 2


def test_straight_lines_through_the_points():
    value = lines((1, 2, 4), (1.0, 3.0, 4.0))
    assert [value(x) for x in (1, 1.5, 2, 3, 4)] == [1.0, 2.0, 3.0, 3.5, 4.0]
    assert [value(x) for x in (6, 0.5)] == [5.0, 0.0]


def test_two_at_once(machine, kept):
    """Whoever comes last, the file is whole."""
    engines = [Engine(tiny(name)) for name in ("qwen3", "llama", "olmo2")]
    threads = [threading.Thread(target=of, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(kept.read_text())
