"""How the command line refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import save_model


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0%", "is 0%, but a share must be above 0% and at most 100%"),
        ("120%", "is 120%, but a share must be above 0% and at most 100%"),
        ("-3%", "is -3%, but a share must be above 0% and at most 100%"),
        ("x%", "is 'x%', but it must be a whole number, or a share such as 5%"),
        ("0", "is 0, but it must be at least 1"),
        ("many", "is 'many', but it must be a whole number, or a share such as 5%"),
        ("", "is '', but it must be a whole number, or a share such as 5%"),
    ],
)
def test_budgets_that_are_none(run, calibrated, budget, message):
    for verb in (["generate", "Hi"], ["chat"], ["eval", "ppl"]):
        base = [*verb, "--model", calibrated, "--policy", "tidal"]
        run(*base, "--budget", budget, stdin="").refused("--budget " + message)
    run("calibrate", "--model", calibrated, "--budget", budget).refused("--budget " + message)
    if budget:
        run(*base[:-1], f"tidal:budget={budget}").refused("tidal: budget " + message)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("nosuch", "There is no drafter 'nosuch': choose lookup, medusa, medusa2, hidden-transfer, longspec, self, or"),
        ("medusa", "There is no drafter 'medusa' beside this model"),
        ("lookup:depth=many", "lookup: depth is 'many', but it must be a whole number"),
        ("lookup:depth=0", "lookup: depth is 0, but it must be at least 1"),
        ("(lookup,nosuch)", "There is no drafter 'nosuch'"),
        ("(lookup,lookup)", "Two of the drafters are 'lookup'; give one of each kind"),
        ("(lookup", "The parentheses in '(lookup' do not match"),
    ],
)
def test_drafters_that_are_not_there(run, folder, draft, message):
    for verb in (["generate", "Hi"], ["chat"], ["eval", "drafts"]):
        run(*verb, "--model", folder, "--draft", draft, stdin="").refused(message)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "Hi", "--policy", "fast"], "Unknown policy 'fast': choose one of dense, tidal"),
        (["generate", "Hi", "--policy", "tidal:speed=3"], "has no option 'speed'; its options are: budget,"),
        (["generate", "Hi", "--policy", "tidal:budget"], "write 'budget=VALUE'"),
        (["generate", "Hi", "--policy", "tidal:budget=many"], "must be a whole number"),
        (["generate", "Hi", "--policy", "tidal:select=1+2"], "must be a whole number"),
        (["generate", "Hi", "--policy", "tidal:full=a+b"], "whole numbers joined by +"),
        (["generate", "Hi", "--policy", "tidal:heads=most"], "must be one of all, kv, map"),
        (["generate", "Hi", "--policy", "tidal:budget=5%%"], "must be a whole number, or a share such as 5%"),
        (["generate", "Hi", "--policy", "tidal:sinks=5%"], "must be a whole number."),
        (["generate", "Hi", "--policy", "tidal:layout=mine"], "must be one of calibrated, paper"),
        (["generate", "Hi", "--budget", 64], "--budget 64 has no effect"),
        (["generate", "Hi", "--budget", "5%"], "--budget 5% has no effect"),
        (["generate", "Hi", "--policy", "tidal:budget=5%", "--budget", "6%"], "--policy sets budget=5%; give one only"),
        (["calibrate", "--budget", "0"], "--budget is 0, but it must be at least 1"),
        (["calibrate", "--json", "no/such/folder/out.json"], "there is no folder 'no/such/folder'"),
        (["generate", "Hi", "--policy", "tidal:budget=32", "--budget", 64], "--policy sets budget=32; give one only"),
        (["generate", "Hi", "--max-tokens", 0], "max_tokens must be at least 1"),
        (["generate", "Hi", "--temperature", -1], "temperature must be 0"),
        (["generate", "Hi", "--temperature", "nan"], "temperature must be 0"),
        (["generate", "Hi", "--top-p", 1.5], "top_p must be above 0 and at most 1"),
        (["generate", "Hi", "--stop", ""], "a stop string must not be empty"),
        (["generate", "Hi", "--json", "no/such/folder/out.json"], "there is no folder 'no/such/folder'"),
        (["generate", "Hi", "--json", "."], "'.' cannot be written"),
        (["generate", "Hi", "--json", os.devnull], "cannot be written"),
        (["generate", ""], "The prompt is empty"),
        (["generate"], "There is no prompt"),
        (["generate", "Hi", "--prompt-file", "a.txt"], "not both"),
        (["generate", "-", "--prompt-file", "a.txt"], "not both"),
        (["generate", "--prompt-file", "nosuch.txt"], "'nosuch.txt' cannot be read (No such file"),
        (["generate", "--prompt-file", "."], "'.' cannot be read (Is a directory)"),
        (["chat", "--system", "@nosuch.txt"], "'nosuch.txt' cannot be read"),
        (["chat", "--policy", "fast"], "Unknown policy 'fast'"),
        (["eval", "needle", "--length", "long"], "--length is 'long', but it must be whole numbers joined by commas"),
        (["eval", "needle", "--length", "300,"], "must be whole numbers joined by commas"),
        (["eval", "needle", "--length", "0"], "--length must be at least 1, not 0"),
        (["eval", "needle", "--budget", "64,-1"], "--budget is -1, but it must be at least 1"),
        (
            ["eval", "needle", "--budget", "64,x"],
            "--budget is 'x', but it must be a whole number, or a share such as 5%",
        ),
        (["eval", "needle", "--budget", "5%,120%"], "--budget is 120%, but a share must be above 0% and at most 100%"),
        (["eval", "needle", "--policy", "dense", "--budget", "64"], "--budget 64 has no effect"),
        (["eval", "needle", "--policy", ","], "names no policy"),
        (["eval", "needle", "--task", "single,x"], "Unknown task 'x': choose among single, multikey, multivalue,"),
        (["eval", "ppl", "--policy", "dense,fast"], "Unknown policy 'fast'"),
        (["eval", "ppl", "--policy", "tidal", "--plot", "out.png"], "add dense to --policy"),
        (["eval", "ppl", "--text", "nosuch.txt"], "'nosuch.txt' cannot be read"),
        (["eval", "recall", "--plot", "no/such/folder/out.png"], "there is no folder 'no/such/folder'"),
        (["demo", "--json", "no/such/folder/out.json"], "there is no folder 'no/such/folder'"),
        (["generate", "Hi", "--accept", "typical"], "typical acceptance needs a temperature above 0"),
        (["chat", "--top-k", -1], "top_k must be 0 (off) or more"),
        (["chat", "--stop", ""], "a stop string must not be empty"),
        (["chat", "--accept", "typical"], "typical acceptance needs a temperature above 0"),
        (["eval", "drafts", "--draft", ","], "--draft names no drafter"),
        (["eval", "drafts", "--draft", "nosuch"], "There is no drafter 'nosuch'"),
        (["eval", "drafts", "--temperature", "warm"], "--temperature is 'warm', but it must be numbers joined by"),
        (["eval", "drafts", "--temperature", "0,-1"], "--temperature must be 0 (greedy) or more"),
        (["eval", "drafts", "--temperature", "nan"], "--temperature must be 0 (greedy) or more"),
        (["eval", "drafts", "--temperature", "0,inf"], "--temperature must be 0 (greedy) or more, and finite"),
        (["bench", "decode", "--threads", 99999], "--threads is 99999, but the machine has"),
        (["bench", "kernels", "--threads", 99999], "--threads is 99999, but the machine has"),
        (["train", "pocket", "--corpus", ".", "--minutes", "nan"], "--minutes is nan, but it must be above 0"),
        (["train", "pocket", "--corpus", ".", "--minutes", "0"], "--minutes is 0, but it must be above 0"),
        (["train", "pocket", "--corpus", ".", "--minutes", "inf"], "--minutes is inf, but it must be above 0"),
        (["train", "pocket", "--corpus", ".", "--hold-out", "a.txt"], "--hold-out names 'a.txt', but there is no such"),
        (["eval", "drafts", "--length", "0"], "--length must be at least 1, not 0"),
        (["eval", "drafts", "--text", "nosuch.txt"], "'nosuch.txt' cannot be read"),
        (["eval", "drafts", "--text", "."], "'.' holds no .txt file"),
        (["eval", "drafts", "--plot", "no/such/folder/out.png"], "there is no folder 'no/such/folder'"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*arguments).refused(message)
    assert os.listdir(tmp_path) == []


def test_an_argument_that_is_not_utf8(run, folder):
    run("generate", os.fsdecode(b"caf\xe9"), "--model", folder).refused("holds bytes that are not UTF-8 text")


@pytest.mark.usefixtures("no_loading")
def test_text_that_is_not_utf8(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    run("generate", "--prompt-file", tmp_path / "latin.txt").refused("latin.txt' is not UTF-8 text; convert it first")
    run("generate", stdin=b"caf\xe9").refused("Standard input is not UTF-8 text; convert it first")
    run("eval", "ppl", "--text", tmp_path / "latin.txt").refused("is not UTF-8 text")
    run("generate", stdin=b"").refused("The prompt is empty")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["generate", "Hi", "--max-tokens", "many"], ["--max-tokens", "valid integer"]),
        (["generate", "Hi", "--nosuch"], ["--nosuch"]),
        (["generate", "Hi", "there"], ["there"]),
        (["calibrate", "--prompts", "0"], ["--prompts", "1"]),
        (["calibrate", "--trials", "0"], ["--trials", "1"]),
        (["eval", "needle", "--trials", "0"], ["--trials", "1"]),
        (["eval", "ppl", "--windows", "0"], ["--windows", "1"]),
        (["eval", "ppl", "--length", "long"], ["--length", "valid integer"]),
        (["eval", "drafts", "--prompts", "0"], ["--prompts", "1"]),
        (["eval", "drafts", "--max-tokens", "1"], ["--max-tokens", "2"]),
        (["train", "medusa", "--out", "x", "--heads", "9"], ["--heads", "8"]),
        (["train", "medusa", "--out", "x", "--lr", "-1"], ["--lr", "0"]),
        (["train", "hidden-transfer", "--out", "x", "--lr", "nan"], ["--lr", "0"]),
        (["train", "pocket", "--corpus", "x", "--lr", "-1"], ["--lr", "0"]),
        (["generate", "Hi", "--accept", "mostly"], ["--accept", "exact", "typical"]),
        (["convert", "medusa", "--from", "x", "--to", "y"], ["--format", "original", "vllm", "springtide"]),
        (["train", "pocket"], ["--corpus"]),
        (["nosuch"], ["nosuch"]),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_what_the_option_parser_rejects(run, arguments, parts):
    run(*arguments).refused(*parts)


def test_a_command_that_is_nearly_one(run):
    result = run("eval", "need")
    assert (result.code, result.out) == (2, "")
    assert result.err == "springtide: No such command 'need'. Did you mean 'needle'?\n"


@pytest.mark.parametrize("arguments", [[], ["eval"]])
def test_no_verb_shows_them_all(run, arguments):
    result = run(*arguments)
    assert (result.code, result.err) == (2, "")
    assert result.out.strip() == run(*arguments, "--help").out.strip() and "eval" in result.out


def lose(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50_000)


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose("config.json"), "holds no config.json"),
        (put("config.json", "{"), "config.json' is broken"),
        (
            put("config.json", '{"model_type": "gpt2"}'),
            "Architecture 'gpt2' is not supported; supported are Llama, Qwen2",
        ),
        (lose("model.safetensors"), "holds no weights (*.safetensors); finish the download"),
        (cut_weights, "download the model again"),
        (put_nan, "Tensor 'lm_head.weight'"),
        (lose("tokenizer.json"), "no usable tokenizer"),
        (put("springtide.json", "{"), "springtide.json' is broken"),
        (put("springtide.json", '{"tidal": {"full": [], "select": [40]}}'), "springtide.json names layer 40"),
        (
            put("springtide.json", '{"version": 9, "tidal": {"full": [], "select": [0]}}'),
            "of a newer version of Springt",
        ),
        (
            put("springtide.json", '{"version": "2", "tidal": {"full": [], "select": [0]}}'),
            "version is not a whole number",
        ),
    ],
)
def test_a_broken_model_folder(run, tmp_path, damage, message):
    folder = save_model(tmp_path / "model")
    damage(folder)
    run("generate", "Hi", "--model", folder).refused(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nosuch"], "There is no model folder 'nosuch'"),
        (["--dtype", "int8"], "Unknown dtype 'int8': choose one of float32"),
        (["--device", "gpu"], "Unknown device 'gpu': use cpu, cuda or cuda:NUMBER"),
        (["--policy", "tidal:full=0,select=9,reselect=10"], "there is no layer 9; the model's layers are 0 to 3"),
        (["--policy", "quest", "--budget", 3], "quest: budget is 3, but it must be at least 16"),
    ],
)
def test_what_does_not_fit_the_model_or_the_machine(run, folder, arguments, message):
    run("generate", "Hi", "--model", folder, *arguments).refused(message)


def test_a_prompt_beyond_the_context(run, folder):
    run("generate", "word " * 2000, "--model", folder).refused("the model's context holds 1024", "shorten the prompt")
