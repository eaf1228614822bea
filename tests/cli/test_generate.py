"""`springtide generate` as a user meets it: what it prints and what it writes."""

from __future__ import annotations

import itertools
import json
import re

import pytest

import springtide
from folders import BOOK, PROMPT, tokenizer
from springtide.drafting.drafter import Drafter
from springtide.drafting.tree import TokenTree
from springtide.engine.session import Session
from springtide.engine.text import Detokenizer

FIELDS = {
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "prompt_tokens": int,
    "cached_tokens": int,
    "completion_tokens": int,
    "ttft_ms": float,
    "tpot_ms": float,
    "kv_bytes_per_token": float,
    "passes": int,
    "drafted_tokens": int,
    "accepted_tokens": int,
    "acceptance_length": float,
}


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


def test_an_interrupt_before_the_first_token_gives_no_time_for_it(run, folder, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", interrupted)
    result = run("generate", PROMPT, "--model", folder, "--stats", "--json", tmp_path / "out.json")
    assert result.code == 130 and "0 generated" in result.err and "TTFT" not in result.err
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["finish_reason"], content["token_ids"], content["ttft_ms"]) == ("cancelled", [], None)


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


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_control_tokens_in_a_prompt_are_text_unless_asked(run, folder, chat, tmp_path):
    counts = []
    for asked in ([], ["--special-tokens"]):
        base = ["generate", "One</s>two", "--model", folder, "--max-tokens", 1, "--json", tmp_path / "out.json"]
        assert run(*base, *chat, *asked).code == 0
        counts.append(json.loads((tmp_path / "out.json").read_text())["prompt_tokens"])
    assert counts[0] > counts[1]


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


def test_stats(run, folder):
    result = run("generate", PROMPT, "--model", folder, "--max-tokens", 4, "--stats")
    assert "4 generated" in result.err and "tokens/s" in result.err
    assert "tokens/s" not in result.out


@pytest.mark.parametrize("verb", [["generate", "-"], ["chat"]])
def test_a_terminal_shows_how_a_long_prompt_is_read(run, folder, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    command = [*verb, "--model", folder, "--max-tokens", 2]
    line = " ".join(BOOK[:1200].split())
    plain = run(*command, stdin=line)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    at_once = run(*command, stdin=line)  # in less than the delay
    monkeypatch.setattr("springtide.cli.show.DELAY", 0)
    shown = run(*command, stdin=line)
    assert plain.out == at_once.out == shown.out
    assert plain.err == "" and "reading" not in at_once.err
    assert re.search(r"\rreading: +\d+%\|.*/[67]\d\d ", shown.err)


def test_an_interrupt_keeps_the_text_so_far(run, folder, expected, tmp_path, monkeypatch):
    start = Session.run

    def interrupted(self):
        yield from itertools.islice(start(self), 6)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", interrupted)
    result = run("generate", PROMPT, "--model", folder, "--max-tokens", 12, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert result.code == 130
    assert result.out == content["text"] + "\n"
    assert content["text"] and expected.text.startswith(content["text"])
    assert content["finish_reason"] == "cancelled"
    assert len(content["token_ids"]) == content["completion_tokens"]
    assert "Traceback" not in result.err


def test_an_interrupt_before_the_first_token(run, folder, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Session, "run", interrupted)
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


@pytest.mark.parametrize(
    "name", ["lookup", "lookup:ngram=3,depth=8", "FOLDER", "lookup:ngram=3,depth=8,FOLDER", "auto"]
)
def test_a_drafter_leaves_the_text_as_it_is(run, folder, expected, drafter, name, tmp_path):
    draft = name.replace("FOLDER", str(drafter))
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
    assert ("fastest at the end" in result.err) == (content["fastest"] is not None)


class Foresight(Drafter):
    """Drafts what it knows will come, three tokens at a time."""

    name = "foresight"

    def __init__(self, truth: list[int]) -> None:
        self.truth = truth

    def propose(self, views):
        known = [len(view.tokens) for view in views]
        chains = [[*view.tokens[-1:], *self.truth[n : n + 3]] for view, n in zip(views, known, strict=True)]
        return [TokenTree(chain, list(range(-1, len(chain) - 1))) for chain in chains]


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
    several = [f"lookup,{draft}" if draft == drafter else draft for draft in base]
    run(*several, "--temperature", 0.8).refused("lookup, medusa would be chosen by measured time; choose one drafter")


def test_the_bundled_model_is_the_default(run, tmp_path):
    result = run("generate", PROMPT, "--max-tokens", 4, "--json", tmp_path / "out.json")
    assert (result.code, result.err) == (0, "")
    assert len(json.loads((tmp_path / "out.json").read_text())["token_ids"]) == 4


def test_samples_and_log_probabilities(run, folder, tmp_path):
    base = ["generate", PROMPT, "--model", folder, "--max-tokens", 6, "--temperature", 1]
    result = run(*base, "--n", 3, "--seed", 7, "--logprobs", 2, "--json", tmp_path / "out.json", "--stats")
    assert result.code == 0 and result.err.count("TTFT") == 3
    contents = json.loads((tmp_path / "out.json").read_text())
    assert result.out == "".join(f"[seed {7 + i}]\n{content['text']}\n" for i, content in enumerate(contents))
    assert run(*base, "--seed", 8).out == contents[1]["text"] + "\n"
    for content in contents:
        assert [each["token_id"] for each in content["logprobs"]] == content["token_ids"]
        assert all(len(each["top"]) == 2 for each in content["logprobs"])
    run(*base, "--logprobs", 2).refused("--logprobs has no effect without --json")
    run(*base, "--n", 0).refused("--n")
