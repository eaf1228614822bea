"""The command line as a user meets it: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import springtide
from folders import BOOK, save_drafter, save_model, tokenizer
from springtide import cli
from springtide.attention import POLICIES
from springtide.attention.calibration import VERSION
from springtide.drafting.drafter import Drafter
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.engine.text import Detokenizer
from springtide.evaluation import brief, needle
from springtide.evaluation.calibrate import Calibrator

PROMPT = "The ship left the harbour"
FIELDS = {
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "ttft_ms": float,
    "tpot_ms": float,
    "kv_bytes_per_token": float,
    "passes": int,
    "drafted_tokens": int,
    "accepted_tokens": int,
    "acceptance_length": float,
}


@dataclass
class Result:
    code: int
    out: str
    err: str

    def refused(self, *parts: str) -> Result:
        """It ended with code 2, and one line on standard error that holds every one of ``parts``."""
        assert self.code == 2
        assert self.out == ""
        assert self.err.startswith("springtide: ") and self.err.endswith(".\n") and self.err.count("\n") == 1
        assert all(part in self.err for part in parts), self.err
        return self


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run the command line; ``stdin`` is text or bytes, None for a terminal at which nobody types."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        raw = stdin.encode() if isinstance(stdin, str) else stdin or b""
        typed = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        monkeypatch.setattr(typed, "isatty", lambda: stdin is None, raising=False)
        monkeypatch.setattr("sys.stdin", typed)
        monkeypatch.setattr("sys.argv", ["springtide", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("calibrated"))
    tidal = {"full": [0], "select": [1], "map": {"2": [1, 0], "3": [1, 1]}}
    (folder / "springtide.json").write_text(json.dumps({"version": VERSION, "tidal": tidal}))
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return path


@pytest.fixture
def no_loading(monkeypatch) -> None:
    """The command must end before it loads a model."""
    monkeypatch.setattr("springtide.cli._load", lambda *_, **__: pytest.fail("loaded a model"))


# -- generate ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(folder) -> springtide.Output:
    return springtide.load(folder).generate(PROMPT, max_tokens=12)


def test_the_prompt_may_be_an_argument_a_file_or_standard_input(run, folder, expected, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    base = ["generate", "--model", folder, "--max-tokens", 12]
    results = [
        run(*base, PROMPT),
        run(*base, "--prompt-file", tmp_path / "prompt.txt"),
        run(*base, "--prompt-file", tmp_path / "marked.txt"),
        run(*base, stdin=PROMPT),
        run(*base, "-", stdin=PROMPT),
    ]
    for result in results:
        assert (result.code, result.out, result.err) == (0, expected.text + "\n", "")


def test_json_holds_the_documented_fields(run, folder, expected, tmp_path):
    result = run("generate", PROMPT, "--model", folder, "--max-tokens", 12, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert {name: type(content[name]) for name in FIELDS} == FIELDS
    assert content["text"] + "\n" == result.out
    assert content["token_ids"] == expected.token_ids
    assert content["prompt_tokens"] == len(tokenizer().encode(PROMPT))
    assert content["completion_tokens"] == 12
    assert content["finish_reason"] == "length"
    run("generate", PROMPT, "--model", folder, "--max-tokens", 1, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["tpot_ms"], content["kv_bytes_per_token"]) == (None, None)


def test_text_is_printed_as_it_comes(run, folder, expected, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda *parts, **_: printed.append("".join(parts)))
    run("generate", PROMPT, "--model", folder, "--max-tokens", 12)
    pieces = [piece for piece in printed if piece]
    assert "".join(pieces) == expected.text
    assert len(pieces) > 4


def test_stop_strings_may_be_repeated(run, folder, expected, tmp_path):
    stop = expected.text[5:7]
    arguments = ["--model", folder, "--max-tokens", 12, "--stop", "never there", "--stop", stop]
    result = run("generate", PROMPT, *arguments, "--json", tmp_path / "out.json")
    assert result.out == expected.text[: expected.text.index(stop)] + "\n"
    assert json.loads((tmp_path / "out.json").read_text())["finish_reason"] == "stop"


def test_sampling_options_reach_the_engine(run, folder):
    base = ["generate", PROMPT, "--model", folder, "--max-tokens", 12]
    options = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    text = springtide.load(folder).generate(PROMPT, max_tokens=12, **options).text
    assert run(*base, *arguments).out == run(*base, *arguments).out == text + "\n"


def test_chat_wraps_the_prompt(run, folder):
    text = springtide.load(folder).chat([{"role": "user", "content": "Who?"}], max_tokens=6).text
    assert run("generate", "Who?", "--chat", "--model", folder, "--max-tokens", 6).out == text + "\n"


def test_policies_and_budgets(run, calibrated, book, tmp_path):
    (tmp_path / "prompt.txt").write_text(BOOK[:600])
    base = ["generate", "--prompt-file", tmp_path / "prompt.txt", "--model", calibrated, "--max-tokens", 12]
    read = {}
    for name, policy in {
        "dense": ["--policy", "dense"],
        "sixteen": ["--policy", "tidal", "--budget", 16],
        "in the text": ["--policy", "tidal:budget=16"],
        "said twice": ["--policy", "tidal:budget=16", "--budget", 16],
        "the same layers": ["--policy", "tidal:budget=16,full=0,select=1"],
        "mapped": ["--policy", "tidal:budget=16,heads=map"],
        "another selection": ["--policy", "tidal:budget=16,full=0,select=1,reselect=2"],
        "a share": ["--policy", "tidal", "--budget", "5%"],
        "a share in the text": ["--policy", "tidal:budget=5%", "--budget", "5%"],
        "everything": ["--policy", "tidal", "--budget", "100%"],
    }.items():
        result = run(*base, *policy, "--json", tmp_path / "out.json")
        assert (result.code, result.err) == (0, "")
        read[name] = json.loads((tmp_path / "out.json").read_text())["kv_bytes_per_token"]
    assert len({read[name] for name in ("sixteen", "in the text", "said twice", "the same layers", "mapped")}) == 1
    assert read["sixteen"] < read["dense"] == read["everything"]
    assert read["sixteen"] < read["another selection"]
    assert read["a share"] == read["a share in the text"] != read["sixteen"]


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


def test_stats(run, folder):
    result = run("generate", PROMPT, "--model", folder, "--max-tokens", 4, "--stats")
    assert "4 generated" in result.err and "tokens/s" in result.err
    assert "tokens/s" not in result.out


def test_an_interrupt_keeps_the_text_so_far(run, folder, expected, tmp_path, monkeypatch):
    start = Engine.run

    def interrupted(self, sequences):
        yield from itertools.islice(start(self, sequences), 6)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "run", interrupted)
    result = run("generate", PROMPT, "--model", folder, "--max-tokens", 12, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert result.code == 130
    assert result.out == content["text"] + "\n"
    assert content["text"] and expected.text.startswith(content["text"])
    assert content["finish_reason"] == "cancelled"
    assert len(content["token_ids"]) == content["completion_tokens"]
    assert "Traceback" not in result.err


def test_an_interrupt_before_the_first_token(run, folder, tmp_path, monkeypatch):
    def interrupted(self, sequences):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Engine, "run", interrupted)
    result = run("generate", PROMPT, "--model", folder, "--json", tmp_path / "out.json", "--stats")
    assert (result.code, result.out) == (130, "\n")
    assert json.loads((tmp_path / "out.json").read_text())["token_ids"] == []


def test_an_interrupt_while_loading(run, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("springtide.loading.load", interrupted)
    result = run("generate", PROMPT, "--model", folder)
    assert result.code == 130
    assert "Traceback" not in result.err


# -- chat ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many tokens of each turn's prompt were in the cache already."""
    kept = []
    start = Engine.start

    def spy(self, *args, **kwargs):
        sequence = start(self, *args, **kwargs)
        kept.append(sequence.cache.length)
        return sequence

    monkeypatch.setattr(Engine, "start", spy)
    return kept


def test_chat_keeps_the_cache_between_turns(run, folder, reads):
    result = run("chat", "--model", folder, "--max-tokens", 5, stdin="Who is it?\n\nAnd why?\n/exit\nnot asked\n")
    assert (result.code, result.err) == (0, "")
    engine = springtide.load(folder)
    messages = [{"role": "user", "content": "Who is it?"}]
    first = engine.chat(messages, max_tokens=5)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And why?"}]
    second = engine.chat(messages, max_tokens=5)
    assert result.out == f"{first.text}\n{second.text}\n"
    assert reads[0] == 0
    assert reads[1] >= len(engine.render(messages[:1]))


def test_reset_starts_anew_with_the_system_message(run, folder, reads, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.")
    arguments = ["--model", folder, "--max-tokens", 5, "--system", f"@{tmp_path / 'system.txt'}"]
    result = run("chat", *arguments, stdin="Who is it?\n/reset\nWho is it?\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"}]
    text = springtide.load(folder).chat(messages, max_tokens=5).text
    assert (result.code, result.out) == (0, f"{text}\n{text}\n")
    assert reads[:2] == [0, 0]


def test_chat_ends_with_its_input(run, folder):
    assert run("chat", "--model", folder, stdin="").code == 0
    assert run("chat", "--model", folder, stdin="/exit").out == ""


def test_an_interrupted_answer_does_not_end_the_chat(run, folder, monkeypatch):
    start, turns = Engine.run, []

    def interrupted(self, sequences):
        turns.append(0)
        yield from itertools.islice(start(self, sequences), 3 if len(turns) == 1 else None)
        if len(turns) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "run", interrupted)
    result = run("chat", "--model", folder, "--max-tokens", 5, stdin="One\nTwo\n")
    assert result.code == 0
    assert " [stopped]\n" in result.out
    assert len(turns) == 2


def test_a_message_too_long_is_refused(run, folder):
    result = run("chat", "--model", folder, "--max-tokens", 5, stdin="word " * 2000 + "\n")
    result.refused("tokens, but the model's context holds 1024")


def test_a_message_too_long_does_not_end_a_chat_at_a_terminal(run, folder, monkeypatch):
    lines = iter(["word " * 2000, "Short"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    result = run("chat", "--model", folder, "--max-tokens", 5)
    assert result.code == 0
    assert "context holds 1024" in result.err
    assert result.out == springtide.load(folder).chat([{"role": "user", "content": "Short"}], max_tokens=5).text + "\n"


def test_chat_input_that_is_not_utf8(run, folder):
    run("chat", "--model", folder, stdin=b"\xff\xfe\n").refused("Standard input is not UTF-8")


# -- drafts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafter(folder, tmp_path_factory) -> Path:
    return save_drafter(tmp_path_factory.mktemp("drafter"), folder)


@pytest.mark.parametrize("name", ["lookup", "folder"])
def test_a_drafter_leaves_the_text_as_it_is(run, folder, expected, drafter, name, tmp_path):
    draft = drafter if name == "folder" else name
    base = ["generate", PROMPT, "--model", folder, "--max-tokens", 12, "--draft", draft]
    result = run(*base, "--stats", "--json", tmp_path / "out.json")
    assert (result.code, result.out) == (0, expected.text + "\n")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["token_ids"] == expected.token_ids
    assert content["acceptance_length"] == pytest.approx(11 / content["passes"])
    for part in (
        f"{content['passes']} passes",
        f"{content['drafted_tokens']} tokens drafted",
        f"{content['accepted_tokens']} accepted",
        f"acceptance length {content['acceptance_length']:.2f}",
    ):
        assert part in result.err


class Foresight(Drafter):
    """Drafts what it knows will come, three tokens at a time."""

    name = "foresight"

    def __init__(self, truth: list[int]) -> None:
        self.truth = truth

    def propose(self, state, tokens):
        chain = [tokens[-1], *self.truth[len(tokens) : len(tokens) + 3]]
        return TokenTree(chain, list(range(-1, len(chain) - 1)))


@pytest.mark.parametrize("stop", [False, True])
def test_drafted_text_is_green_on_a_terminal(run, folder, expected, monkeypatch, stop):
    truth = [*tokenizer().encode(PROMPT), *expected.token_ids]
    load = springtide.loading.load
    monkeypatch.setattr(
        "springtide.loading.load", lambda *args, **options: load(*args, **{**options, "draft": Foresight(truth)})
    )
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ["generate", PROMPT, "--model", folder, "--max-tokens", 12, "--draft", "lookup"]
    text = expected.text
    if stop:
        arguments += ["--stop", text[-3:-1]]
        text = text[: text.index(text[-3:-1])]
    assert run(*arguments, "--stats").out == text + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(*arguments).out == text + "\n"
    shown = run(*arguments, "--stats").out
    assert re.sub(COLOUR, "", shown) == text + "\n"
    # The first token came with the prompt, and each pass ends with one that was not drafted.
    words, wanted = Detokenizer(tokenizer(), (arguments[-1],) if stop else ()), []
    for token, drafted in zip(expected.token_ids, [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0], strict=True):
        wanted += [(letter, bool(drafted)) for letter in words.add([token])]
    assert colours(shown)[:-1] == [*wanted, *((letter, False) for letter in words.finish())][: len(text)]
    assert {green for _, green in wanted} == {True, False}


COLOUR = re.compile(r"\x1b\[([0-9;]*)m")


def colours(shown: str) -> list[tuple[str, bool]]:
    """The characters, and whether each is green; between lines the colour is given anew."""
    found, green, at = [], False, 0
    for mark in COLOUR.finditer(shown):
        found += [(letter, green) for letter in shown[at : mark.start()]]
        green, at = mark[1] == "32", mark.end()
    return [*found, *((letter, green) for letter in shown[at:])]


def test_typical_acceptance(run, folder, drafter):
    base = ["generate", PROMPT, "--model", folder, "--max-tokens", 12, "--draft", drafter, "--accept", "typical"]
    run(*base).refused("typical acceptance needs a temperature above 0")
    results = [run(*base, "--temperature", 0.8) for _ in range(2)]
    assert results[0].code == 0 and results[0].out == results[1].out
    text = (
        springtide.load(folder, draft=drafter).generate(PROMPT, max_tokens=12, temperature=0.8, accept="typical").text
    )
    assert results[0].out == text + "\n"


def test_chat_with_a_drafter(run, folder, drafter):
    plain = run("chat", "--model", folder, "--max-tokens", 5, stdin="Who is it?\nAnd why?\n")
    drafted = run("chat", "--model", folder, "--max-tokens", 5, "--draft", drafter, stdin="Who is it?\nAnd why?\n")
    assert (drafted.code, drafted.out) == (0, plain.out)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("nosuch", "There is no drafter 'nosuch': choose lookup, medusa, medusa2, hidden-transfer, or give"),
        ("medusa", "There is no drafter 'medusa' beside this model"),
    ],
)
def test_drafters_that_are_not_there(run, folder, draft, message):
    for verb in (["generate", "Hi"], ["chat"], ["eval", "drafts"]):
        run(*verb, "--model", folder, "--draft", draft, stdin="").refused(message)


def test_eval_drafts(run, folder, drafter, book, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(BOOK[:9000])
    (texts / "b.txt").write_text(BOOK[9000:])
    base = ["eval", "drafts", "--model", folder, "--length", "300,320", "--max-tokens", 6]
    result = run(
        *(*base, "--text", texts, "--draft", f"lookup,{drafter}", "--prompts", 3, "--recall", 2),
        *("--temperature", "0,0.8", "--policy", "dense,streaming", "--budget", 64),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert all(list(row) == DRAFTS for row in rows)
    cells = [(row["text"], row["temperature"], row["policy"], row["draft"], row["prompts"]) for row in rows]
    assert cells == [
        (text, temperature, policy, draft, count)
        for text, count in (("book", 3), ("recall", 2))
        for temperature in (0.0, 0.8)
        for policy in ("dense", "streaming")
        for draft in ("lookup", str(drafter))
    ]
    assert all(row["outputs_equal"] == 1.0 and row["prompts_that_differ"] == 0 for row in rows)
    assert "3/3" in result.out and "2/2" in result.out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    alone = run(*base, "--text", book, "--prompts", 2, "--adaptive")
    assert (alone.code, alone.err) == (0, "")
    assert "2/2" in alone.out


DRAFTS = [
    *("draft", "policy", "budget", "temperature", "text", "prompts", "acceptance_length", "acceptance_by_position"),
    *("passes_per_token", "ms_per_token", "undrafted_ms_per_token", "speedup", "outputs_equal", "prompts_that_differ"),
    *("perplexity", "base_perplexity"),
]


def test_eval_drafts_of_one_that_changes_the_model(run, folder, book, tmp_path):
    adapted = save_drafter(tmp_path / "adapted", folder, adapter=True)
    result = run(
        *("eval", "drafts", "--model", folder, "--text", book, "--draft", f"lookup,{adapted}", "--prompts", 2),
        *("--length", 64, "--max-tokens", 6, "--json", tmp_path / "out.json"),
    )
    assert (result.code, result.err) == (0, "")
    same, changed = json.loads((tmp_path / "out.json").read_text())
    assert same["perplexity"] == same["base_perplexity"] == changed["base_perplexity"] != changed["perplexity"]
    assert same["outputs_equal"] == changed["outputs_equal"] == 1.0
    assert f"{changed['perplexity']:.2f} ({same['perplexity']:.2f})" in result.out


# -- calibrate -----------------------------------------------------------------------------------------------------


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
    assert run("calibrate", "--model", folder, *SIZE, "--text", book, "--out", tmp_path).code == 0
    assert sorted(os.listdir(tmp_path)) == ["springtide.json", "springtide.png"]
    assert not (folder / "springtide.json").exists()


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


# -- eval ----------------------------------------------------------------------------------------------------------


def test_needle(run, calibrated, book, tmp_path):
    result = run(
        *("eval", "needle", "--model", calibrated, "--text", book, "--length", "300,320", "--trials", 1),
        *("--policy", "dense,tidal:recent=4,streaming", "--budget", "32,64"),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    names = ["policy", "budget", "length", "depth", "trials", "exact_match", "task", "exact_match_se", "of_dense"]
    names += ["of_dense_se", "agreement", "agreement_se", "kl", "kl_se"]
    assert all(list(row) == names for row in rows)
    measured = [("dense", None), ("tidal", 32), ("tidal", 64), ("streaming", 32), ("streaming", 64)]
    assert {(row["policy"], row["budget"]) for row in rows} == set(measured)
    assert [row["depth"] for row in rows] == [0.1, 0.3, 0.5, 0.7, 0.9, None] * len(measured) * 2
    assert all(row["trials"] == (5 if row["depth"] is None else 1) for row in rows)
    assert all(row["kl"] == 0 for row in rows if row["policy"] == "dense")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split()[:2] for line in result.out.splitlines()[-10:-5]] == [["single", name] for name, _ in measured]


def test_needle_tasks_and_chats(run, calibrated, book, tmp_path, monkeypatch):
    """Without --chat or --no-chat: in the template if there is one that takes a context."""
    made = []
    ask = needle.ask

    def spy(engine, trial, policies):
        made.append(engine.tokenizer.decode(trial.context).startswith("<user>Read the following text."))
        return ask(engine, trial, policies)

    monkeypatch.setattr(needle, "ask", spy)
    folder = shutil.copytree(calibrated, tmp_path / "chats")
    arguments = ["--text", book, "--length", 600, "--trials", 1, "--policy", "streaming", "--budget", 64]
    for options in (["--task", "multivalue,quote"], ["--chat"]):
        made.append(options[0])
        result = run("eval", "needle", "--model", folder, *arguments, *options, "--plot", tmp_path / "out.png")
        assert (result.code, result.err) == (0, "")
        assert all(f" {name} " in f" {result.out} " for name in ("multivalue", "quote")) is ("--task" in options)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    for options in ([], ["--no-chat"]):
        made.append(str(options))
        assert run("eval", "needle", "--model", folder, *arguments, *options).code == 0
    assert made == ["--task", False, False, "--chat", False, "[]", True, "['--no-chat']", False]
    (folder / "chat_template.jinja").unlink()
    assert run("eval", "needle", "--model", folder, *arguments).code == 0
    run("eval", "needle", "--model", folder, *arguments, "--chat").refused(
        "no chat template; ask without one (--no-chat)"
    )


def test_version(run):
    result = run("--version")
    assert (result.code, result.out.strip()) == (0, springtide.__version__)


def test_ppl(run, calibrated, book, tmp_path):
    result = run(
        *("eval", "ppl", "--model", calibrated, "--text", book, "--length", 200, "--windows", 2),
        *("--policy", "dense,tidal", "--budget", "16,32", "--json", tmp_path / "out.json"),
        *("--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    names = ["policy", "budget", "tokens", "perplexity", "ratio_to_dense", "kl_to_dense", "kl_curve"]
    assert all(list(row) == names for row in rows)
    assert [(row["policy"], row["budget"]) for row in rows] == [("dense", None), ("tidal", 16), ("tidal", 32)]
    assert rows[0]["ratio_to_dense"] == 1.0
    assert {row["tokens"] for row in rows} == {200}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_recall(run, calibrated, book, tmp_path):
    result = run(
        *("eval", "recall", "--model", calibrated, "--text", book, "--length", 320, "--trials", 1),
        *("--budget", 32, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    names = ["policy", "budget", "layer", "mass", "top_k", "worst_head_mass", "mass_by_head"]
    assert all(list(row) == names for row in rows)
    assert "worst head mass" in " ".join(result.out.split()) and "by head" not in result.out
    assert {row["policy"] for row in rows} == {"tidal", "quest", "streaming", "oracle"}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_bundled_text_is_the_default(run, folder):
    assert run("eval", "ppl", "--model", folder, "--length", 64, "--windows", 1, "--policy", "dense").code == 0


def test_every_length_is_checked_before_any_work(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("worked"))
    target = tmp_path / "out.json"
    result = run("eval", "needle", "--model", folder, "--policy", "dense", "--length", "300,4096", "--json", target)
    result.refused("A length of 4096 takes 4097 tokens", "context holds 1024; use a shorter length")
    assert not target.exists()


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("needle", "The text has 2 tokens, but a context of 400 needs"),
        ("ppl", "The text has 2 tokens, but a window needs 400"),
        ("recall", "The text has 2 tokens, but a context of 400 needs"),
    ],
)
def test_a_text_too_short(run, calibrated, tmp_path, verb, message):
    (tmp_path / "short.txt").write_text("Hm")
    arguments = ["--model", calibrated, "--text", tmp_path / "short.txt", "--length", 400, "--budget", 32]
    assert len(tokenizer().encode("Hm")) == 2
    run("eval", verb, *arguments).refused(message)


def test_nothing_to_recall(run, folder):
    run("eval", "recall", "--model", folder, "--length", 400, "--policy", "dense").refused("reads the whole context")


def test_policies_are_listed_with_their_options(run):
    result = run("policies")
    assert (result.code, result.err) == (0, "")
    for name, policy in POLICIES.items():
        assert f"{name}: " in result.out
        options = [field.name for field in fields(policy) if "help" in field.metadata]
        assert all(f"    {option} " in result.out for option in options)


def test_the_bundled_model_is_not_calibrated_in_place(run):
    run("calibrate").refused("The bundled model is calibrated already; give --model DIR, or --out DIR")


def test_env(run):
    result = run("env")
    assert (result.code, result.err) == (0, "")
    assert f"torch         {torch.__version__}" in result.out
    assert springtide.__version__ in result.out


def test_the_bundled_model_is_the_default(run, tmp_path):
    result = run("generate", PROMPT, "--max-tokens", 4, "--json", tmp_path / "out.json")
    assert (result.code, result.err) == (0, "")
    assert len(json.loads((tmp_path / "out.json").read_text())["token_ids"]) == 4


# -- bad input -----------------------------------------------------------------------------------------------------


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
        (["calibrate", "--model", "nosuch"], "There is no model folder 'nosuch'"),
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
        (["chat", "--accept", "typical"], "typical acceptance needs a temperature above 0"),
        (["eval", "drafts", "--draft", ","], "--draft names no drafter"),
        (["eval", "drafts", "--draft", "nosuch"], "There is no drafter 'nosuch'"),
        (["eval", "drafts", "--temperature", "warm"], "--temperature is 'warm', but it must be numbers joined by"),
        (["eval", "drafts", "--temperature", "0,-1"], "--temperature must be 0 (greedy) or more"),
        (["eval", "drafts", "--temperature", "nan"], "--temperature must be 0 (greedy) or more"),
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
    "arguments",
    [
        ["generate", "Hi", "--max-tokens", "many"],
        ["generate", "Hi", "--nosuch"],
        ["generate", "Hi", "there"],
        ["calibrate", "--prompts", "0"],
        ["calibrate", "--trials", "0"],
        ["eval", "needle", "--trials", "0"],
        ["eval", "ppl", "--windows", "0"],
        ["eval", "ppl", "--length", "long"],
        ["eval", "drafts", "--prompts", "0"],
        ["eval", "drafts", "--max-tokens", "1"],
        ["generate", "Hi", "--accept", "mostly"],
        ["train", "pocket"],
        ["nosuch"],
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_what_the_option_parser_rejects(run, arguments):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err and result.err


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


def test_a_model_that_cannot_chat(run, tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    run("generate", "Hi", "--chat", "--model", folder).refused("no chat template")
    run("chat", "--model", folder, stdin="").refused("no chat template")


def test_a_template_that_takes_no_system_message(run, tmp_path):
    folder = save_model(tmp_path / "model")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}Hi"
    (folder / "chat_template.jinja").write_text(template)
    run("chat", "--model", folder, "--system", "Be brief", stdin="").refused("No system role")


# -- as a process --------------------------------------------------------------------------------------------------


def test_a_terminal_that_cannot_show_every_character(folder, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-c", "from springtide.cli import main; main()"),
            *("generate", "-", "--model", folder, "--max-tokens", "12", "--json", tmp_path / "out.json"),
            *("--temperature", "3", "--seed", "2"),
        ],
        input="é".encode(),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    text = json.loads((tmp_path / "out.json").read_text())["text"]
    assert not text.isascii()
    assert result.stdout == text.encode("ascii", "replace") + b"\n"
