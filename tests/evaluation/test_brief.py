"""A calibration of a minute at most, for whoever uses TidalDecode without having calibrated the model."""

from __future__ import annotations

import itertools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import springtide
from folders import PROMPT, save_model
from springtide import SpringtideError
from springtide.attention.calibration import VERSION
from springtide.attention.tidal import NotCalibratedError
from springtide.evaluation import brief
from springtide.loading import know_layers, under

CALIBRATION = {"version": VERSION, "tidal": {"full": [], "select": [0, 2], "map": {"1": [1, 0], "3": [0, 0]}}}


@pytest.fixture
def quickly(monkeypatch) -> None:
    """Brief calibration in even less time."""
    monkeypatch.setattr(brief, "LENGTH", 300)
    monkeypatch.setattr(brief, "PROMPTS", 1)


@pytest.mark.usefixtures("quickly")
def test_a_model_without_calibration_is_calibrated_once(folder, calibrations):
    said = r"^tidal: the model was not calibrated, so it was now, in \d+ s, kept in .*; `springtide calibrate` does"
    with pytest.warns(UserWarning, match=said) as caught:
        first = springtide.load(folder, policy="tidal:budget=8")
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    (kept,) = calibrations.iterdir()
    assert str(kept) in str(caught[0].message)
    content = json.loads(kept.read_text())
    assert content["version"] == VERSION and content["tidal"]["length"] == 300
    assert first.policy.dense_layers == tuple(sorted(content["tidal"]["full"] + content["tidal"]["select"]))
    assert len(first.policy.dense_layers) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(folder)
        for other in (folder, model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)):
            assert springtide.load(other, policy="tidal:budget=8").policy == first.policy
        assert first.using("tidal:budget=8").policy == first.policy
    assert first.generate(PROMPT, max_tokens=4).token_ids
    assert not (folder / "springtide.json").exists()


@pytest.mark.usefixtures("quickly")
def test_another_model_is_calibrated_for_itself(folder, tmp_path, calibrations):
    for number, other in enumerate((folder, save_model(tmp_path, hidden_size=64), folder), start=1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            springtide.load(other, policy="tidal")
        assert len(caught) == (number < 3) and len(list(calibrations.iterdir())) == min(number, 2)


@pytest.mark.usefixtures("quickly")
def test_a_calibration_that_is_not_wanted_is_not_used_for_a_brief_one(fresh):
    (fresh / "springtide.json").write_text(json.dumps(CALIBRATION))
    with pytest.warns(UserWarning, match="was not calibrated, so it was now"):
        policy = springtide.load(fresh, policy="tidal:budget=8", calibrated=False).policy
    assert len(policy.dense_layers) == 1


@pytest.mark.usefixtures("quickly")
def test_calibrated_for_every_engine_of_the_model(folder):
    engine = springtide.load(folder)
    other = engine.using("streaming:budget=8")
    with pytest.raises(NotCalibratedError, match="not calibrated"):
        other.using("tidal")
    with pytest.warns(UserWarning, match="was not calibrated"):
        policy = under(engine, "tidal").policy
    assert other.using("tidal").policy == policy
    assert engine.policy.name == "dense"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "policy", ["dense", "tidal:layout=paper", "tidal:full=0,select=1", "quest", "streaming:budget=5%"]
)
def test_policies_that_need_no_calibration(folder, policy, calibrations, monkeypatch):
    monkeypatch.setattr("springtide.evaluation.brief.calibrate_briefly", lambda *_: pytest.fail("calibrated"))
    know_layers(springtide.load(folder, policy=policy), ["dense", policy])
    assert not calibrations.exists()


def test_without_a_tokenizer_nothing_can_be_calibrated(folder, calibrations):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(NotCalibratedError, match="not calibrated; run `springtide calibrate"):
        springtide.load(model, policy="tidal")
    assert not calibrations.exists()


@pytest.mark.usefixtures("quickly")
def test_a_home_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"so it was now, in \d+ s; `springtide calibrate`"):
        springtide.load(folder, policy="tidal")


@pytest.mark.usefixtures("quickly")
def test_a_kept_calibration_that_is_broken(folder, calibrations):
    with pytest.warns(UserWarning, match="was not calibrated"):
        springtide.load(folder, policy="tidal")
    (kept,) = calibrations.iterdir()
    kept.write_text("{")
    with pytest.raises(SpringtideError, match=r"calibrations.*\.json' is broken .* or delete the file"):
        springtide.load(folder, policy="tidal")


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(("seconds", "steps"), [(29, 2), (31, 1)])
def test_a_minute_is_the_most_that_it_may_take(folder, calibrations, monkeypatch, seconds, steps):
    """Of two steps; whether that is enough is known after the first."""
    readings = itertools.count(step=seconds)
    monkeypatch.setattr(brief, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    if steps == 2:
        with pytest.warns(UserWarning, match="so it was now"):
            springtide.load(folder, policy="tidal")
        return
    with pytest.raises(
        SpringtideError, match=r"would take more than a minute here; run .*tidal:layout=paper\.$"
    ) as caught:
        springtide.load(folder, policy="tidal")
    assert "\n" not in str(caught.value) and next(readings) == 2 * seconds
    assert not calibrations.exists()


def test_a_context_too_short_to_calibrate_in(tmp_path):
    folder = save_model(tmp_path, max_position_embeddings=60)
    with pytest.raises(SpringtideError, match="A length of 59 is too short to calibrate at"):
        springtide.load(folder, policy="tidal")
