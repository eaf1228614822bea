"""What the benchmarks report follows from what they measure."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from statistics import mean

import pytest
import torch

from springtide.attention import parse_policy
from springtide.attention.calibration import VERSION
from springtide.benchmarks import contenders, decode, prefill, rows, traffic
from springtide.benchmarks.peers import Target, Transformers
from springtide.engine.engine import Engine
from springtide.rows.cache import Cache
from tiny import tiny

DECODE = (
    "contender policy budget context threads dtype ms_per_token tokens_per_second bytes_per_token gb_per_second "
    "bandwidth floor_ms ratio_to_floor ratio_to"
)
PREFILL = "contender policy budget context threads dtype seconds tokens_per_second tflops ratio_to"
ROWS = "policy budget context rows threads dtype ms ratio_to_one_row"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(contenders, "PAUSE", 0)
    monkeypatch.setattr(rows, "PAUSE", 0)
    monkeypatch.setattr(decode, "read_bandwidth", lambda _: 2e9)


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny("llama"), calibration={"version": VERSION, "tidal": {"full": [0], "select": [1]}})


def policies(engine, *names):
    return [engine.resolve(parse_policy(name)) for name in names]


def transformers() -> Transformers:
    return Transformers(Target(tiny("llama"), "tiny", 256, 1))


class Broken(Transformers):
    """Fails to read long contexts, or after a while."""

    name = "broken"

    def __init__(self, longest: int, steps: int) -> None:
        super().__init__(Target(tiny("llama"), "tiny", 256, 1))
        self.longest, self.steps = longest, steps

    def read(self, tokens):
        if len(tokens) > self.longest:
            raise MemoryError
        return super().read(tokens)

    def resume(self, reader):
        return self.read(reader.tokens[: reader.cache.length])

    def step(self):
        self.steps -= 1
        if self.steps < 0:
            raise RuntimeError("out of\nblocks")
        return super().step()


def results(found, total):
    """The last thing that a benchmark yields, after as many None as it said."""
    *before, last = found
    assert before == [None] * total
    return last


def test_decode(engine):
    chosen = policies(engine, "dense", "tidal:budget=16")
    found = decode.decode(engine, chosen, [transformers()], [40, 70], 6, "prefill")
    cells = results(found, decode.steps_of(2, 3, 6))
    names = [("springtide", "dense", None), ("springtide", "tidal", 16), ("transformers", None, None)]
    assert [(c.contender, c.policy, c.budget) for c in cells] == names * 2
    assert [c.context for c in cells] == [40] * 3 + [70] * 3
    weights, slot = traffic.weight_bytes(engine.stack.model), 2 * 2 * 8 * 4  # bytes of a token in one layer
    for cell in cells:
        assert list(asdict(cell)) == DECODE.split()
        seen = mean(range(cell.context + 1, cell.context + 7))
        # Two layers that read everything, one of which reads the keys again to choose, and two that read its choice.
        cached = 4 * seen * slot if cell.policy != "tidal" else (2 * seen + seen / 2 + 2 * 16) * slot
        assert cell.bytes_per_token == weights + cached
        assert (cell.threads, cell.dtype, cell.bandwidth) == (torch.get_num_threads(), "float32", 2.0)
        assert cell.floor_ms == pytest.approx(cell.bytes_per_token / 2e6)
        assert cell.ratio_to_floor == pytest.approx(cell.ms_per_token / cell.floor_ms)
        assert cell.tokens_per_second == pytest.approx(1e3 / cell.ms_per_token)
        assert cell.gb_per_second == pytest.approx(cell.bytes_per_token / cell.ms_per_token / 1e6)
        peer = next(c for c in cells if c.context == cell.context and c.contender == "transformers")
        assert cell.ratio_to == {"transformers": pytest.approx(cell.ms_per_token / peer.ms_per_token)}


def test_random_keys_and_values_take_the_same_traffic(engine):
    chosen = policies(engine, "dense", "tidal:budget=16")
    computed, drawn = (
        results(decode.decode(engine, chosen, [transformers()], [40], 2, fill), decode.steps_of(1, 3, 2))
        for fill in ("prefill", "random")
    )
    assert [cell.bytes_per_token for cell in computed] == [cell.bytes_per_token for cell in drawn]
    assert all(cell.ms_per_token for cell in drawn)


@pytest.mark.parametrize("length", [1, 40])
def test_filled(engine, length):
    computed, drawn = (contenders.filled(engine, length, fill) for fill in ("prefill", "random"))
    assert computed.tokens[:length] == drawn.tokens
    assert computed.cache.length == drawn.cache.length == drawn.cache.exact == length
    for layer in range(4):
        for x, y in zip(computed.cache.read(layer, 0, length), drawn.cache.read(layer, 0, length), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            assert torch.equal(x, y) == (length == 1)


@pytest.mark.parametrize(
    ("broken", "measured", "reason"),
    [(Broken(50, 1000), [40], "MemoryError"), (Broken(1000, 9), [40], "out of blocks")],
)
def test_a_failing_peer_loses_its_own_results_only(engine, broken, measured, reason):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        *_, cells = decode.decode(engine, policies(engine, "dense"), [transformers(), broken], [40, 70], 6, "prefill")
    assert [str(w.message) for w in caught] == [f"broken failed at a context of 70 ({reason})"]
    assert len(cells) == 6
    for cell in cells:
        lost = cell.context not in measured
        assert (cell.ratio_to["broken"] is None) == lost
        assert cell.ratio_to["transformers"] is None if cell.contender == "broken" and lost else cell.ratio_to
        if cell.contender == "broken" and lost:
            figures = (cell.ms_per_token, cell.tokens_per_second, cell.gb_per_second, cell.ratio_to_floor)
            assert figures == (None,) * 4
        else:
            assert cell.ms_per_token > 0


def test_a_failing_engine_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(contenders.Springtide, "step", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(decode.decode(engine, policies(engine, "dense"), [], [40], 2, "prefill"))


def test_prefill(engine):
    found = prefill.prefill(engine, policies(engine, "dense"), [transformers()], [40, 70], 2)
    cells = results(found, prefill.steps_of(2, 2, 2))
    assert [(c.contender, c.context) for c in cells] == [
        (name, length) for length in (40, 70) for name in ("springtide", "transformers")
    ]
    for cell in cells:
        assert list(asdict(cell)) == PREFILL.split()
        assert cell.tokens_per_second == pytest.approx(cell.context / cell.seconds)
        operations = traffic.prefill_flops(engine.stack.model, (None,) * 4, cell.context)
        assert cell.tflops == pytest.approx(operations / cell.seconds / 1e12)
        peer = next(c for c in cells if c.context == cell.context and c.contender == "transformers")
        assert cell.ratio_to == {"transformers": pytest.approx(cell.seconds / peer.seconds)}


def test_prefill_with_a_failing_peer(engine):
    with pytest.warns(UserWarning, match=r"broken failed at a context of 70 \(MemoryError\)"):
        *_, cells = prefill.prefill(engine, policies(engine, "dense"), [Broken(64, 0)], [40, 70], 1)
    assert [cell.seconds is None for cell in cells] == [False, False, False, True]


def test_a_budget_that_is_a_share_is_named_so(engine):
    chosen = policies(engine, "tidal:budget=25%", "streaming:budget=12.5%")
    cells = results(rows.rows(engine, chosen, [2], 40, 2, "prefill"), rows.steps_of(2, [2], 2))
    assert [(c.policy, c.budget) for c in cells] == [("tidal", "25%")] * 2 + [("streaming", "12.5%")] * 2
    *_, cells = decode.decode(engine, chosen, [], [40], 2, "prefill")
    assert [contenders.title(c.contender, c.policy, c.budget) for c in cells] == [
        "tidal 25%",
        "streaming 12.5%",
    ]


def test_rows(engine):
    chosen = policies(engine, "dense", "tidal:budget=16")
    cells = results(rows.rows(engine, chosen, [4, 2], 40, 3, "prefill"), rows.steps_of(2, [4, 2], 3))
    assert [(c.policy, c.budget, c.rows) for c in cells] == [
        (name, budget, count) for name, budget in (("dense", None), ("tidal", 16)) for count in (1, 2, 4)
    ]
    for cell in cells:
        assert list(asdict(cell)) == ROWS.split()
        one = next(c for c in cells if c.policy == cell.policy and c.rows == 1)
        assert cell.ratio_to_one_row == pytest.approx(cell.ms / one.ms)
        assert cell.context == 40


def test_rows_are_timed_as_while_decoding(engine, monkeypatch):
    """What a policy makes once for a sequence is made once, not in every pass."""
    calls, means = [], Cache.means
    monkeypatch.setattr(Cache, "means", lambda cache, layer, *rest: calls.append(layer) or means(cache, layer, *rest))
    list(rows.rows(engine, policies(engine, "dense", "tidal:budget=64,means=4"), [2], 140, 3, "prefill"))
    assert sorted(calls) == [2, 3]  # the layers that read what another one chose
