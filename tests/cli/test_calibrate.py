"""`springtide calibrate` as a user meets it, and the brief calibration that other verbs do."""

from __future__ import annotations

import json
import os

import pytest

from folders import PROMPT, save_model
from springtide.evaluation import brief
from springtide.evaluation.calibrate import Calibrator

SIZE = ["--budget", 32, "--length", 400, "--prompts", 1, "--trials", 3]
CURVE = {
    "dense_layers": int,
    "full": list,
    "select": list,
    "full_heads": list,
    "budget": int,
    "kl_questions": float,
    "kl_text": float,
    "kv_bytes": int,
    "predicted_ms": float,
}


def test_calibrate_writes_what_policies_then_use(run, tmp_path, book):
    folder = save_model(tmp_path / "model")
    before = os.listdir(folder)
    options = ("--dense-layers", 2, "--map", "--text", book, "--json", tmp_path / "out.json")
    result = run("calibrate", "--model", folder, *SIZE, *options)
    assert (result.code, result.err) == (0, "")
    said = result.out.replace("\n", "")
    assert f"Wrote the layers to {folder / 'springtide.json'}." in said
    assert "On fresh prompts, with 2 layers' worth of dense KV heads and a budget of 32 of 400 tokens: " in said
    assert sorted(set(os.listdir(folder)) - set(before)) == ["springtide.json", "springtide.png"]
    tidal = json.loads((folder / "springtide.json").read_text())["tidal"]
    assert len(tidal["full"]) + len(tidal["select"]) + len(tidal["full_heads"]) / 2 == 2
    assert (tidal["budget"], tidal["length"]) == (32, 400)
    assert {"kl_questions", "kl_questions_se", "kl_text", "kl_text_se", "exact_match", "exact_match_dense"} <= set(
        tidal
    )
    assert (folder / "springtide.png").read_bytes().startswith(b"\x89PNG")
    curve = json.loads((tmp_path / "out.json").read_text())
    assert all({name: type(value) for name, value in point.items()} == CURVE for point in curve)
    assert [(point["dense_layers"], point["budget"]) for point in curve] == [
        (n, b) for n in (1, 2) for b in (16, 32, 64)
    ]
    chosen = next(point for point in curve if (point["dense_layers"], point["budget"]) == (2, 32))
    assert all(chosen[name] == tidal[name] for name in ("full", "select", "full_heads"))
    for policy in ("tidal", "tidal:heads=map"):
        used = run("generate", PROMPT, "--model", folder, "--policy", policy, "--budget", 16, "--max-tokens", 2)
        assert (used.code, used.err) == (0, "")


def test_calibrate_may_write_elsewhere(run, folder, book, tmp_path):
    """To a folder that it makes, as training does."""
    out = tmp_path / "new" / "folder"
    assert run("calibrate", "--model", folder, *SIZE, "--text", book, "--out", out).code == 0
    assert sorted(os.listdir(out)) == ["springtide.json", "springtide.png"]
    assert not (folder / "springtide.json").exists()


@pytest.mark.usefixtures("no_loading")
def test_a_place_that_can_be_no_folder_is_found_before_a_model_is_loaded(run, book):
    run("calibrate", "--model", "m", "--text", book, "--out", book).refused(
        f"'{book}' cannot be made a folder (File exists); choose another --out"
    )


def test_calibrate_goes_on_where_it_was_stopped(run, folder, book, tmp_path, monkeypatch):
    measured, calls = Calibrator.measured, []

    def stopped(self, tidal, which):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append((tidal, which))
        return measured(self, tidal, which)

    command = ["calibrate", "--model", folder, *SIZE, "--text", book, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Calibrator, "measured", stopped)
        result = run(*command)
    assert (result.code, result.out) == (130, "")
    assert f"Stopped; the same command goes on from {tmp_path / 'springtide.partial'}." in result.err
    assert os.listdir(tmp_path) == ["springtide.partial"]
    monkeypatch.setattr("springtide.evaluation.effects.Recording.effects", lambda _: pytest.fail("did it again"))
    with monkeypatch.context() as patch:
        patch.setattr("springtide.evaluation.calibrate.write", lambda *_: pytest.fail("the disk is full"))
        with pytest.raises(pytest.fail.Exception):
            run(*command)
    assert "springtide.partial" in os.listdir(tmp_path)
    assert run(*command).code == 0
    assert sorted(os.listdir(tmp_path)) == ["springtide.json", "springtide.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dense-layers", 4], "choose 1 to 3"),
        (["--dense-layers", 2, "--target-kl", 0.1], "Give either --dense-layers or --target-kl, not both"),
        (["--target-kl", -1], "--target-kl is -1.0, but it must be above 0"),
        (["--length", 200, "--budget", 200], "must be at least 1 and below the length, 200"),
        (["--length", 64, "--budget", 16], "too short to calibrate at"),
        (["--length", 5000], "model's context holds 1024; use a shorter length"),
        (["--chat", "--length", 400], "does not take a question"),
    ],
)
def test_calibrate_refuses(run, tmp_path, arguments, message):
    folder = save_model(tmp_path / "model")
    if "--chat" in arguments:
        (folder / "chat_template.jinja").write_text("{{ raise_exception('No') }}")
    before = sorted(os.listdir(folder))
    run("calibrate", "--model", folder, *arguments).refused(message)
    assert sorted(os.listdir(folder)) == before


def test_a_calibration_by_an_earlier_version(run, tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "springtide.json").write_text('{"tidal": {"full": [0], "select": [1]}}')
    result = run("generate", PROMPT, "--model", folder, "--policy", "tidal", "--max-tokens", 2)
    assert result.code == 0 and result.err.count("\n") == 1
    assert result.err.startswith("springtide: tidal: springtide.json is of an earlier version")
    run("generate", "Hi", "--model", folder, "--policy", "tidal:heads=map").refused(
        "needs a map that calibration learnt"
    )


def test_calibrate_needs_a_model(run):
    run("calibrate", "--model", "nosuch").refused("There is no model folder 'nosuch'")


def test_the_bundled_model_is_not_calibrated_in_place(run):
    run("calibrate").refused("The bundled model is calibrated already; give --model DIR, or --out DIR")


def test_calibrate_leaves_what_is_not_the_users_alone(run, tmp_path, book, home, monkeypatch):
    """A model in the hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = save_model(tmp_path / "models--a--b" / "snapshots" / "0123")
    before = sorted(os.listdir(folder))
    result = run("calibrate", "--model", folder, *SIZE, "--text", book)
    assert result.code == 0 and sorted(os.listdir(folder)) == before
    (place,) = (home / "data" / "springtide" / "calibrations").iterdir()
    assert sorted(os.listdir(place)) == ["springtide.json", "springtide.png"]
    assert f"Wrote the layers to {place / 'springtide.json'}." in result.out
    said = run("generate", PROMPT, "--model", folder, "--policy", "tidal", "--max-tokens", 2)
    assert (said.code, said.err) == (0, "")


@pytest.fixture
def quickly(monkeypatch) -> None:
    """Brief calibration in even less time."""
    monkeypatch.setattr(brief, "LENGTH", 300)
    monkeypatch.setattr(brief, "PROMPTS", 1)


@pytest.mark.usefixtures("quickly")
def test_a_model_that_is_not_calibrated_is_calibrated_once_and_that_is_said(run, folder, book, calibrations):
    base = ["generate", PROMPT, "--model", folder, "--max-tokens", 2, "--policy", "tidal"]
    result = run(*base)
    assert result.code == 0
    assert result.err.startswith("springtide: tidal: the model was not calibrated, so it was now, in ")
    assert result.err.endswith("; `springtide calibrate` does it better\n") and result.err.count("\n") == 1
    assert len(list(calibrations.iterdir())) == 1 and str(calibrations) in result.err
    again = run(*base)
    assert (again.code, again.out, again.err) == (0, result.out, "")
    other = run("eval", "ppl", "--model", folder, "--text", book, "--length", 200, "--windows", 1, "--budget", 16)
    assert (other.code, other.err) == (0, "")
    assert sorted(os.listdir(folder)) == sorted(name for name in os.listdir(folder) if "springtide" not in name)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "verb", [["chat"], ["eval", "ppl"], ["eval", "needle", "--trials", "1"], ["eval", "recall", "--trials", "1"]]
)
def test_other_commands_calibrate_too(run, folder, book, verb):
    more = ["--text", book, "--length", "300"] if verb[0] == "eval" else ["--max-tokens", "2"]
    result = run(*verb, *more, "--model", folder, "--policy", "tidal", "--budget", 16, stdin="")
    assert "springtide: tidal: the model was not calibrated, so it was now" in result.err
    assert result.code == 0


def test_a_model_that_takes_too_long_to_calibrate(run, folder, monkeypatch, calibrations):
    monkeypatch.setattr(brief, "SECONDS", 0)
    result = run("generate", PROMPT, "--model", folder, "--policy", "tidal")
    result.refused("take more than a minute here; run `springtide calibrate --model DIR`", "tidal:layout=paper")
    assert not calibrations.exists()
    paper = run("generate", PROMPT, "--model", folder, "--max-tokens", 2, "--policy", "tidal:layout=paper")
    assert (paper.code, paper.err) == (0, "")
