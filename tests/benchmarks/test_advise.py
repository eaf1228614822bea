"""Combinations are predicted from parts, measured whole, and the fastest of them are advised."""

from __future__ import annotations

from dataclasses import replace

import pytest

import springtide
from folders import BOOK, VOCAB, save_drafter, save_model, tokenizer
from guesses import Guesses
from springtide import SpringtideError
from springtide.attention import parse_policy
from springtide.benchmarks import advise as benchmark
from springtide.benchmarks.advise import Combination, advise, contenders, policies, read_drafters, written
from springtide.evaluation.drafts import Contender, passages
from tiny import tiny

CALIBRATION = {"version": 2, "tidal": {"full": [0], "select": [1]}}
COUNT = 13
BASE = Combination(
    context=80,
    policy="dense",
    draft="none",
    lossless=True,
    prompts=2,
    acceptance_length=1.0,
    rows_per_pass=1.0,
    outputs_equal=1.0,
    draft_ms=0.0,
    verify_ms=2.0,
    dense_ms=2.0,
    predicted_speedup=1.0,
    ms_per_token=2.0,
    speedup=1.0,
)


@pytest.fixture
def engine():
    return springtide.load(tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())


@pytest.fixture
def calibrated(engine):
    engine.stack.spec = replace(engine.stack.spec, calibration=CALIBRATION)
    return engine


def cut(lengths=(80,), prompts=2):
    *_, found = passages(tokenizer(), [BOOK], lengths, prompts, 0)
    return found


# -- what is compared ----------------------------------------------------------------------------------------------


def test_what_needs_calibration_is_left_out_where_there_is_none(engine):
    assert list(policies(engine, None).values()) == ["dense"]
    assert benchmark.default_drafters(engine) == ["lookup", "lookup:tokens=6"]


def test_what_is_compared_by_default(calibrated):
    assert list(policies(calibrated, None).values()) == ["dense", "tidal:budget=3%"]
    assert benchmark.default_drafters(calibrated) == [
        "lookup",
        "lookup:tokens=6",
        "self:policy=(tidal:budget=3%),tokens=4",
        "self:policy=(tidal:budget=3%),tokens=8",
        "self:policy=(tidal:budget=3%),tokens=8,draft=lookup",
    ]


def test_drafters_beside_the_model_but_for_those_that_change_it(tmp_path):
    folder = save_model(tmp_path / "model")
    for name in ("medusa", "own"):
        save_drafter(folder / "drafters" / name, folder)
    save_drafter(folder / "drafters" / "medusa2", folder, adapter=True)
    found = benchmark.default_drafters(springtide.load(folder))
    assert found == ["lookup", "lookup:tokens=6", "medusa", str(folder / "drafters" / "own")]


@pytest.mark.parametrize("text", ["dense", "tidal:budget=5%,correct=64", "quest:budget=96", "streaming:budget=64"])
def test_policies_are_named_as_they_were_given(engine, text):
    policy = parse_policy(text)
    assert written(policy) == text and parse_policy(written(policy)) == policy


def test_dense_is_there_once_and_first(calibrated):
    asked = [parse_policy(text) for text in ("streaming:budget=64", "dense")]
    assert list(policies(calibrated, asked).values()) == ["dense", "streaming:budget=64"]


def test_every_policy_has_no_drafter_and_each_but_itself(calibrated):
    named = policies(calibrated, None)
    drafts = ["lookup", "self:policy=(tidal:budget=3%),tokens=4", "self:policy=(streaming:budget=64)"]
    found = contenders(calibrated, {}, drafts, list(named))
    assert [(named[each.base.policy], each.draft) for each in found] == [
        *(("dense", draft) for draft in ("none", *drafts)),
        *(("tidal:budget=3%", draft) for draft in ("none", "lookup", "self:policy=(streaming:budget=64)")),
    ]
    assert all(not each.engine.adaptive or each.engine is each.base for each in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" , ", "--draft names no drafter; give at least one"),
        ("lookup,auto", "--draft names 'auto', but each drafter is measured by itself"),
        ("(lookup,medusa)", "--draft names '(lookup,medusa)', but each drafter is measured by itself"),
    ],
)
def test_names_that_do_not_do(text, message):
    with pytest.raises(SpringtideError) as caught:
        read_drafters(text)
    assert str(caught.value).startswith(message)


def test_folders_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "lookup"):
        (tmp_path / name).mkdir()
    assert read_drafters("lookup,mine,lookup:tokens=6,mine") == ["lookup", str(tmp_path / "mine"), "lookup:tokens=6"]


# -- figures -------------------------------------------------------------------------------------------------------


def test_times_of_passes_are_by_policy_and_context(engine, monkeypatch):
    asked = [engine.resolve("dense"), engine.resolve("streaming:budget=64")]

    def times(engine, cells, context, passes, fill, pause):
        yield from [None] * (1 + len(cells) * passes)
        return {(policy, rows): context + rows + 1000 * asked.index(policy) for policy, rows in cells}

    monkeypatch.setattr(benchmark, "median_ms", times)
    *steps, found = benchmark.costs(engine, asked, [100, 200])
    assert steps == [None] * benchmark.steps_of(2, 2)
    assert found[asked[0], 100](1) == 101 and found[asked[1], 200](12) == pytest.approx(1212)


@pytest.mark.parametrize("kind", ["oracle", "wrong"])
def test_the_prediction_is_tokens_of_a_pass_over_the_time_of_its_parts(engine, kind):
    """Depths of 8: 12 tokens after the first one take passes of 9 and 3 with perfect guesses."""
    pieces, named = cut(), policies(engine, [parse_policy("streaming:budget=64")])
    dense, sparse = named
    truths = [piece.context + engine.generate(piece.context, max_tokens=COUNT).token_ids for piece in pieces]
    found = []
    for policy in named:
        base = engine.using(policy)
        drafted = base.drafting(Guesses(truths, kind, vocab=VOCAB))
        drafted.adaptive = False
        found += [Contender("none", base, base, base), Contender("guesses", drafted, base, base)]
    costs = {(dense, 80): lambda rows: 10 + rows, (sparse, 80): lambda rows: 5 + rows}
    first, *rest = advise(found, named, pieces, costs, 0.0, COUNT)
    assert len(rest) == 1
    rows = first()
    assert [(each.policy, each.draft, each.lossless) for each in rows] == [
        ("dense", "none", True),
        ("dense", "guesses", True),
        ("streaming:budget=64", "none", False),
        ("streaming:budget=64", "guesses", False),
    ]
    plain, drafted, other, _ = rows
    assert (plain.acceptance_length, plain.rows_per_pass, plain.verify_ms, plain.dense_ms) == (1, 1, 11, 11)
    assert plain.speedup == 1 and other.speedup == pytest.approx(plain.ms_per_token / other.ms_per_token)
    assert other.verify_ms == 6 and other.dense_ms == 11 and drafted.outputs_equal == 1
    assert drafted.acceptance_length == (6 if kind == "oracle" else 1)
    assert drafted.rows_per_pass > 1 and drafted.verify_ms == pytest.approx(10 + drafted.rows_per_pass)
    for each in rows:
        assert each.draft_ms > 0
        expected = each.acceptance_length * 11 / (each.draft_ms + each.verify_ms)
        assert each.predicted_speedup == pytest.approx(expected)


def test_one_that_changes_the_model_is_not_lossless(tmp_path):
    folder = save_model(tmp_path / "model")
    own = str(save_drafter(tmp_path / "own", folder, adapter=True))
    engine = springtide.load(folder)
    named = policies(engine, [])
    with pytest.warns(UserWarning, match="changes the model"):
        changed = {own: springtide.load(folder, draft=own)}
    found = contenders(engine, changed, ["lookup", own], list(named))
    costs = {(policy, 80): float for policy in named}
    *_, rows = advise(found, named, cut(), costs, 0.0, 6)
    assert [(each.draft, each.lossless) for each in rows()] == [("none", True), ("lookup", True), (own, False)]


# -- advice --------------------------------------------------------------------------------------------------------


def ms(draft, ms, policy="dense", context=80):
    own = {"ms_per_token": ms, "speedup": None if ms is None else 2 / ms}
    return replace(BASE, draft=draft, policy=policy, context=context, lossless=policy == "dense", **own)


class Of:
    """Engines, of whose drafters the kind alone matters."""

    def __init__(self, kind: str) -> None:
        self.drafter = self.engine = self
        self.name = kind


def chosen(found):
    names = {each.draft for each in found}
    known = [Contender(name, Of(name.partition(":")[0]), *[None] * 2) for name in names]
    return benchmark.drafters(benchmark.advice(found), found, known)


def test_the_fastest_of_what_is_lossless_and_of_all():
    found = [ms("none", 2.0), ms("lookup", 1.0), ms("medusa", None), ms("lookup", 0.5, "tidal:budget=3%")]
    (advice,) = benchmark.advice(found)
    assert advice.lossless is found[1] and advice.fastest is found[3]
    assert benchmark.said([advice]) == (
        "After 80 tokens: --draft lookup (2.00x) is the fastest of what is lossless; --policy tidal:budget=3% --draft "
        "lookup (4.00x), which is not lossless, is the fastest of all."
    )
    assert advice.as_json() == {
        "context": 80,
        "lossless": {"policy": "dense", "draft": "lookup", "ms_per_token": 1.0, "speedup": 2.0},
        "fastest": {"policy": "tidal:budget=3%", "draft": "lookup", "ms_per_token": 0.5, "speedup": 4.0},
    }
    assert chosen(found) == ["lookup"]


def test_advice_can_be_pasted_into_a_shell():
    draft = "self:policy=(tidal:budget=3%),tokens=4"
    said = benchmark.said(benchmark.advice([ms(draft, 1.0)]))
    assert said.startswith(f"After 80 tokens: --draft '{draft}' (2.00x) is the fastest")


def test_where_nothing_pays_nothing_is_advised():
    found = [ms("none", 2.0), ms("lookup", 2.1), ms("none", 2.2, "tidal:budget=3%")]
    assert chosen(found) == []
    assert benchmark.said(benchmark.advice(found)) == (
        "After 80 tokens: plain decoding (1.00x) is the fastest of what is lossless, and of all."
    )


def test_drafters_of_all_contexts_one_of_each_kind():
    found = [
        *(ms("none", 2.0), ms("lookup", 1.0), ms("lookup:tokens=6", 1.1), ms("medusa", 1.2)),
        *(
            ms(draft, time, context=160)
            for draft, time in {"none": 4.0, "lookup": 2.9, "lookup:tokens=6": 2.0, "medusa": 3.0}.items()
        ),
        *(ms(draft, time, context=320) for draft, time in {"none": 8.0, "lookup": 7.0, "medusa": 6.0}.items()),
    ]
    assert [each.lossless.draft for each in benchmark.advice(found)] == ["lookup", "lookup:tokens=6", "medusa"]
    assert chosen(found[:8]) == ["lookup:tokens=6"]
    found.append(ms("lookup:tokens=6", 9.0, context=320))
    assert chosen(found) == ["lookup:tokens=6", "medusa"]


def test_a_model_that_ends_at_once():
    with pytest.raises(SpringtideError, match=r"After prompts of 80 tokens the model ends at once, .* another --text"):
        benchmark.advice([ms("none", None), ms("lookup", None)])


def test_contexts_beyond_the_model(engine):
    benchmark.check_contexts(engine, [100, 960], 64)
    for context, tokens, more in ((961, 64, 64), (1000, 8, 32)):
        with pytest.raises(SpringtideError) as caught:
            benchmark.check_contexts(engine, [context, 5], tokens)
        assert str(caught.value) == (
            f"A context of {context} tokens and {more} more are beyond the model's context of 1024; give a shorter "
            "--context."
        )
