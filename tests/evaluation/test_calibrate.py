"""Calibration finds a layout that the model can use, or says why it cannot."""

from __future__ import annotations

import pytest

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide import SpringtideError
from springtide.attention import Tidal
from springtide.engine.engine import Engine
from springtide.evaluation.calibrate import Calibration, calibrate, steps, write
from tiny import tiny

OPTIONS = {"dense_layers": 2, "tidal": Tidal(budget=32), "length": 400, "prompts": 1, "trials": 4}


def engine(name: str = "qwen3", **overrides) -> Engine:
    model = tiny(name, vocab_size=VOCAB, max_position_embeddings=1024, **overrides)
    return springtide.load(model, tokenizer())


def calibrated(engine: Engine, text: str = BOOK, **options) -> Calibration:
    *before, result = calibrate(engine, text, **{**OPTIONS, **options})
    assert set(before) == {None}
    assert len(before) <= steps(options.get("prompts", 1), options.get("trials", 4))
    return result


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_layout_is_the_best_one_measured_and_can_be_used(tmp_path):
    found = calibrated(engine())
    assert found.divergence == min(kl for _, kl in found.measured)
    assert found.layout == found.measured[0][0]
    assert len({*found.layout.full, *found.layout.select}) == 2
    path = write(found.as_json(OPTIONS["tidal"], 400), tmp_path)
    springtide.load(engine().stack.model, policy=Tidal(budget=8, **found.layout.options))
    assert path == tmp_path / "springtide.json"


def test_layers_with_a_sliding_window_take_no_part():
    found = calibrated(engine("gemma2"), dense_layers=1)
    assert found.layers == [1, 3]
    assert {*found.layout.full, *found.layout.select} <= {1, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_layers": 4}, "4 dense layers were asked for, but the model has 4 layers .* choose 1 to 3"),
        ({"dense_layers": 0}, "choose 1 to 3"),
        ({"tidal": Tidal(budget=400)}, "budget is 400, but must be at least 1 and below the length, 400"),
        ({"tidal": Tidal(budget=0)}, "budget is 0, but must be at least 1"),
        ({"length": 100}, "100 is too short to calibrate at"),
        ({"length": 1000}, "model's context holds 1024; use a shorter length"),
        ({"text": "A short text."}, "The text has .* tokens, but the length is 400"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("worked"))
    with pytest.raises(SpringtideError, match=message):
        calibrated(engine(), **options)


def test_a_model_without_layers_to_choose():
    with pytest.raises(SpringtideError, match="0 layers without a sliding window, but 2 are needed"):
        calibrated(engine("mistral"))
