"""`springtide bench` as a user meets it."""

from __future__ import annotations

import json
import os

import pytest
import torch
from test_benchmarks import DECODE, PREFILL, ROWS
from test_shapes import SMALL
from test_simulated import FIELDS

from springtide.benchmarks import contenders, peers, shapes, traffic


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(contenders, "PAUSE", 0)
    monkeypatch.setattr(traffic, "BUFFER", 2**20)


@pytest.fixture
def threads():
    """The number of threads is the process's, so it is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def content(path):
    return json.loads(path.read_text())


def check_plot(path):
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("threads")
def test_decode(run, folder, tmp_path):
    result = run(
        *("bench", "decode", "--model", folder, "--context", "64,100", "--policy", "dense,streaming", "--budget", 16),
        *("--against", "transformers", "--steps", 2, "--threads", 1, "--fill", "random"),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png", "--cache", tmp_path / "cache"),
    )
    assert (result.code, result.err) == (0, "")
    rows = content(tmp_path / "out.json")
    assert all(list(row) == DECODE.split() for row in rows)
    assert [(row["contender"], row["policy"], row["budget"], row["context"]) for row in rows] == [
        (*who, context)
        for context in (64, 100)
        for who in (("springtide", "dense", None), ("springtide", "streaming", 16), ("transformers", None, None))
    ]
    assert {row["threads"] for row in rows} == {1}
    assert "float32, 1 threads, read bandwidth" in result.out
    assert "streaming 16" in result.out and "transformers" in result.out
    check_plot(tmp_path / "out.png")
    assert not (tmp_path / "cache").exists()


def test_prefill(run, folder, tmp_path):
    result = run(
        *("bench", "prefill", "--model", folder, "--context", "64,100", "--against", "transformers"),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = content(tmp_path / "out.json")
    assert all(list(row) == PREFILL.split() for row in rows)
    assert [row["contender"] for row in rows] == ["springtide", "transformers"] * 2
    check_plot(tmp_path / "out.png")


def test_rows(run, tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "llama-1b", shapes.SHAPES["llama-1b"] | SMALL)
    result = run(
        *("bench", "rows", "--shape", "llama-1b", "--context", 64, "--rows", "2,4", "--budget", 16, "--passes", 2),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = content(tmp_path / "out.json")
    assert all(list(row) == ROWS.split() for row in rows)
    assert [(row["policy"], row["rows"]) for row in rows] == [(p, n) for p in ("dense", "tidal") for n in (1, 2, 4)]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    check_plot(tmp_path / "out.png")


def test_simulated_drafts(run, tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "llama-1b", shapes.SHAPES["llama-1b"] | SMALL)
    result = run(
        *("bench", "decode", "--shape", "llama-1b", "--context", "64,90", "--fill", "random", "--steps", 2),
        *("--policy", "dense,tidal", "--budget", "16,32", "--draft", "sim:tau=3,accept=0.8+1"),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    found = content(tmp_path / "out.json")
    assert all(list(row) == FIELDS.split() and row["simulated"] is True for row in found)
    assert [(row["context"], row["policy"], row["budget"], row["accept"]) for row in found] == [
        (context, "tidal", budget, accept) for context in (64, 90) for budget in (16, 32) for accept in (0.8, 1)
    ]
    for row in found:
        assert f"simulated acceptance: tidal {row['budget']} drafts after {row['context']} tokens" in result.out
        assert f"d = {row['dense_ms']:.4g} ms: a dense pass of 1 row; c = {row['draft_ms']:.4g} ms" in result.out
        assert f"break-even after {row['context']} tokens: " in result.out
    assert result.out.count("simulated acceptance a = 0.8") == result.out.count("simulated acceptance a = 1 ") == 4
    assert "ms/token = (ceil(g / 3) * c + v) / (1 + a + ... + a^g)" in result.out
    check_plot(tmp_path / "out.png")


@pytest.mark.parametrize(
    ("break_even", "told"),
    [
        (None, "none, even a simulated acceptance of 1 does not pay"),
        (0.0, "none, every simulated acceptance pays"),
        (0.87654, "a simulated acceptance of 0.877"),
    ],
)
def test_the_break_even_is_named(run, folder, monkeypatch, break_even, told):
    monkeypatch.setattr("springtide.benchmarks.simulated.break_even", lambda *_: break_even)
    base = ("bench", "decode", "--model", folder, "--context", 64, "--steps", 1)
    result = run(*base, "--policy", "streaming:budget=16", "--draft", "sim:tokens=2")
    assert f"break-even after 64 tokens: {told}\n" in result.out
    assert "(g * c + v)" in result.out and "a sparse pass of 1 row\n" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--draft", "sim:tau=0"], "sim: tau is 0, but it must be at least 1"),
        (["decode", "--draft", "sim:accept=2"], "sim: accept is 2, but it must be above 0 and at most 1"),
        (["decode", "--draft", "lookup"], "takes 'sim' with its options, not 'lookup'"),
        (["decode", "--draft", "sim", "--policy", "dense"], "--policy names none; add one, such as tidal"),
        (["decode", "--draft", "sim", "--against", "transformers"], "leave out --against or --draft"),
        (["decode", "--model", "pocket", "--shape", "llama-1b"], "Give either --model or --shape, not both"),
        (["decode", "--shape", "llama-9b"], "Unknown shape 'llama-9b': choose one of llama-1b, llama-3b"),
        (["decode", "--shape", "llama-1b", "--context", "2000000"], "use a shorter --context"),
        (["decode", "--against", "vllm"], "Unknown peer 'vllm': choose among transformers, openvino, llama.cpp"),
        (["decode", "--against", "transformers,"], "Unknown peer ''"),
        (["prefill", "--against", "llama.cpp"], "run `pip install llama-cpp-python gguf`"),
        (["decode", "--context", "0"], "--context must be at least 1, not 0"),
        (["decode", "--json", "no/such/out.json"], "there is no folder 'no/such'"),
        (["rows", "--rows", "0,4"], "--rows must be at least 1, not 0"),
        (["rows", "--policy", "dense", "--budget", "64"], "--budget 64 has no effect"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("springtide.loading.load", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setattr(peers.LlamaCpp, "packages", {"no_such_module": "llama-cpp-python", "gguf": "gguf"})
    run("bench", *arguments).refused(message)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "total"),
    [
        (["decode", "--context", "64,1000", "--steps", 24], 1025),
        (["prefill", "--context", "64,1024"], 1025),
        (["rows", "--context", 1000, "--rows", "1,25"], 1025),
        (["decode", "--context", 1000, "--policy", "streaming", "--draft", "sim:tokens=24"], 1025),
        (["decode", "--context", 1000, "--policy", "streaming", "--draft", "sim:rows=33"], 1033),
    ],
)
def test_a_context_beyond_the_models(run, folder, arguments, total):
    run("bench", *arguments, "--model", folder).refused(f"takes {total} tokens, but the model's context holds 1024")


@pytest.mark.parametrize(
    "arguments",
    [["decode", "--fill", "zeros"], ["decode", "--steps", 0], ["prefill", "--repeats", 0], ["rows", "--passes", 0]],
)
def test_what_the_option_parser_rejects(run, arguments):
    assert run("bench", *arguments).code == 2


@pytest.mark.usefixtures("threads")
def test_kernels(run, tmp_path):
    target = tmp_path / "out.json"
    result = run("bench", "kernels", "--context", 300, "--budget", "16,64", "--turns", 1, "--json", target)
    assert (result.code, result.err) == (0, "")
    rows = content(target)
    assert [(row["kernel"], row["rows"], row["budget"]) for row in rows] == [
        ("attend", 4, None),
        ("attend", 16, None),
        ("attend", 64, None),
        ("attend_gathered", 4, 16),
        ("attend_gathered", 4, 64),
        ("choose", 4, 16),
    ]
    assert [row["bytes"] for row in rows] == [8 * 64 * 2 * n for n in (600, 600, 600, 32, 128, 300)]
    for row in rows:
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["ratio_to_torch"] == pytest.approx(row["ms"] / row["torch_ms"])


def test_kernels_gather_no_more_than_there_is(run):
    run("bench", "kernels", "--context", 300, "--budget", 400).refused("--budget 400 is more than the context of 300")
