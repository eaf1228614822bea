"""Drafters are measured on the same prompts as the engine without them, and what they change is seen."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import springtide
from folders import BOOK, VOCAB, tokenizer
from guesses import Guesses
from springtide import SpringtideError, facts
from springtide.drafting.drafter import Drafter
from springtide.drafting.guesser import Guesser
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.evaluation import drafts as evaluation
from springtide.evaluation.drafts import Contender, Drafts, Passage, accepted_depths, drafts, passages, steps
from springtide.evaluation.perplexity import perplexity
from springtide.rows.sampling import Sampling
from tiny import tiny

COUNT = 24


@pytest.fixture(scope="module")
def engine() -> Engine:
    return springtide.load(tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())


def cut(texts=(BOOK,), lengths=(80,), prompts=4, recall=0, seed=0) -> list[Passage]:
    *progress, result = passages(tokenizer(), texts, lengths, prompts, recall, seed)
    assert progress == [None] * len(texts)
    return result


def measured(found, pieces, temperatures=(0.0,), count=COUNT) -> list[Drafts]:
    done = list(drafts(found, pieces, temperatures, count))
    assert len(done) == steps(pieces)
    return done[-1]()


def truths(engine, pieces, count=COUNT):
    prompts = [prompt for piece in pieces for prompt in piece.prompts]
    outputs = engine.generate(prompts, max_tokens=count)
    return [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]


def against(engine, name, drafter) -> Contender:
    drafted = engine.drafting(drafter)
    drafted.adaptive = False
    return Contender(name, drafted, engine, engine)


# -- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_have_their_lengths_and_begin_sentences_or_lines():
    words = tokenizer()
    opening = words.encode("")
    pieces = cut(prompts=9, lengths=(60, 90))
    assert [len(piece.context) for piece in pieces] == [60, 90, 60, 90, 60, 90, 60, 90, 60]
    book = words.decode(words.encode(BOOK, add_special_tokens=False))
    for piece in pieces:
        assert piece.text == "book" and piece.prompts == [piece.context]
        assert piece.context[: len(opening)] == opening
        text = words.decode(piece.context[len(opening) :])
        at = book.index(text)
        assert at == 0 or book[:at].rstrip(" ").endswith((".", "!", "?", "\n"))
    assert len({tuple(piece.context) for piece in pieces}) == 9


def test_prompts_follow_the_seed():
    assert cut(seed=3, recall=3, lengths=(300,)) == cut(seed=3, recall=3, lengths=(300,))
    assert cut(seed=3) != cut(seed=4)


def test_prompts_come_from_every_text_that_is_long_enough():
    half = len(BOOK) // 2
    first, second = BOOK[:half], BOOK[half:]
    words = tokenizer()
    found = [words.decode(piece.context) for piece in cut((first, second, "Too short."), prompts=20)]
    assert any(text in first for text in found) and any(text in second for text in found)


def test_recall_prompts_ask_for_a_fact_that_was_told():
    pieces = cut(lengths=(300, 330), prompts=2, recall=12)
    asking = [piece for piece in pieces if piece.text == "recall"]
    assert [len(piece.prompts) for piece in asking] == [5, 5, 2]
    for piece in asking:
        context = tokenizer().decode(piece.context)
        for prompt in piece.prompts:
            assert prompt[: len(piece.context)] == piece.context
            question = tokenizer().decode(prompt[len(piece.context) :])
            word = next(word for word in facts.WORDS if question == facts.question(word))
            assert f"The magic number for {word} is" in context


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ("Hm",)}, "The text has . tokens, but a prompt needs 80; give a longer text or shorter prompts"),
        ({"texts": ("word " * 300,), "prompts": 2}, "has 1 sentences or lines .* 2 prompts were asked for"),
        ({"lengths": (20,), "recall": 1}, "too short for 5 facts"),
    ],
)
def test_texts_that_do_not_do(options, message):
    with pytest.raises(SpringtideError, match=message):
        cut(**options)


# -- figures -------------------------------------------------------------------------------------------------------


def test_passes_from_what_was_drafted():
    yes, no = True, False
    assert accepted_depths([]) == []
    assert accepted_depths([no, no]) == [0, 0]
    assert accepted_depths([yes, yes, no, no, yes, no]) == [2, 0, 1]
    assert accepted_depths([yes, no, yes, yes]) == [1, 2]  # the output ended among the drafted tokens


@pytest.mark.parametrize("policy", ["dense", "tidal:budget=16,means=0,full=0,select=1,reselect=3"])
def test_a_perfect_drafter_and_one_that_is_never_right(engine, policy):
    under = engine.using(policy)
    pieces = cut()
    known = [prompt + _decoded(under, prompt) for piece in pieces for prompt in piece.prompts]
    # Depths of 8 and then the rest: 23 tokens after the first one take 9 + 9 + 5.
    oracle, wrong = measured(
        [against(under, kind, Guesses(known, kind, vocab=VOCAB)) for kind in ("oracle", "wrong")], pieces
    )
    assert (oracle.draft, oracle.text, oracle.prompts, oracle.temperature) == ("oracle", "book", 4, 0.0)
    assert oracle.acceptance_length == pytest.approx(23 / 3)
    assert oracle.passes_per_token == pytest.approx(3 / 23)
    assert oracle.rows_per_pass == pytest.approx(23 / 3) and oracle.draft_ms > 0
    assert oracle.acceptance_by_position == pytest.approx([1] * 4 + [2 / 3] * 4)
    assert (wrong.acceptance_length, wrong.passes_per_token, wrong.acceptance_by_position) == (1.0, 1.0, [])
    for row in (oracle, wrong):
        assert (row.policy, row.budget) == (under.policy.name, getattr(under.policy, "budget", None))
        assert (row.outputs_equal, row.prompts_that_differ) == (1.0, 0)
        assert row.speedup == pytest.approx(row.undrafted_ms_per_token / row.ms_per_token)
        assert row.perplexity is row.base_perplexity is None
    assert oracle.undrafted_ms_per_token == wrong.undrafted_ms_per_token > 0


def _decoded(engine, prompt) -> list[int]:
    """As the evaluation decodes: from a cache that was read densely."""
    sequence = engine.start(prompt, Sampling(max_tokens=COUNT), reuse=engine.read(prompt))
    list(engine.run([sequence]))
    return sequence.output


def test_acceptance_by_position_adds_up(engine):
    pieces = cut(prompts=6)
    (row,) = measured([against(engine, "mixed", Guesses(truths(engine, pieces), "mixed", vocab=VOCAB))], pieces)
    shares = row.acceptance_by_position
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] <= shares[0] < 1
    assert row.acceptance_length == pytest.approx(1 + sum(shares))


def test_temperatures_texts_and_lengths_have_rows_of_their_own(engine):
    pieces = cut(lengths=(300, 320), prompts=3, recall=5)
    rows = measured([against(engine, "random", Guesses([], "random", vocab=VOCAB))], pieces, (0.0, 0.8), 8)
    assert [(row.text, row.length, row.temperature, row.prompts) for row in rows] == [
        ("book", 300, 0.0, 2),
        ("book", 300, 0.8, 2),
        ("book", 320, 0.0, 1),
        ("book", 320, 0.8, 1),
        ("recall", 300, 0.0, 5),
        ("recall", 300, 0.8, 5),
    ]
    assert all(row.outputs_equal == 1.0 for row in rows)


class Loud(Drafter):
    """Spoils what the target has cached."""

    name = "loud"

    def commit(self, segment, hidden, kept):
        keys, values = segment.cache.read(0, 0, segment.prefix + 1)
        segment.cache.write(0, 0, keys, -values)


def test_a_drafter_that_changes_the_output_is_found_out(engine):
    (row,) = measured([against(engine, "loud", Loud())], cut())
    assert (row.outputs_equal, row.prompts_that_differ) == (0.0, 4)


class Ends(Drafter):
    """Drafts nothing."""

    name = "nothing"


def test_outputs_of_one_token_have_no_figures(engine):
    at_once = engine.drafting(Drafter())
    at_once.eos = frozenset(range(VOCAB))
    (row,) = measured([against(at_once, "nothing", Ends())], cut())
    assert row.prompts == 4 and row.outputs_equal == 1.0
    assert row.acceptance_length is row.passes_per_token is row.ms_per_token is row.speedup is None
    assert row.acceptance_by_position == []
    evaluation.show([row])


def test_every_contender_begins_in_turn(engine, monkeypatch):
    pieces, order = cut(prompts=3), []
    decode = evaluation._decode
    monkeypatch.setattr(
        evaluation, "_decode", lambda under, *rest: order.append(under.drafter.name) or decode(under, *rest)
    )
    measured([against(engine, "loud", Loud()), against(engine, "nothing", Ends())], pieces, count=4)
    first_three = ["none", "loud", "nothing"]
    assert order[:3] == first_three  # to warm up
    assert [order[3:][i : i + 3][0] for i in (0, 3, 6)] == ["loud", "nothing", "none"]
    assert [sorted(order[3:][i : i + 3]) for i in (0, 3, 6)] == [sorted(first_three)] * 3


def test_a_prompt_is_read_once(engine, monkeypatch):
    pieces, lengths = cut(prompts=2, lengths=(80,)), []
    read = Engine.read
    monkeypatch.setattr(Engine, "read", lambda self, tokens: lengths.append(len(tokens)) or read(self, tokens))
    measured([against(engine, "nothing", Ends()), against(engine, "loud", Loud())], pieces, (0.0, 0.5), 4)
    assert lengths == [80] * (3 + 2)  # three warm up


def test_prompts_beyond_the_context(engine):
    with pytest.raises(SpringtideError, match="A prompt of 1000 tokens and 25 more are beyond the model's context"):
        measured([against(engine, "nothing", Ends())], cut(lengths=(1000,), prompts=1), count=25)


# -- contenders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tunable(Guesser):
    """Remembers the cost that it was tuned by."""

    name = "tunable"
    cost: float | None = None

    def tuned(self, cost):
        return Tunable(cost(3))

    def propose(self, views):
        return [TokenTree([view.tokens[-1], 0], [-1, 0]) for view in views]


def test_contenders_of_every_policy(engine, monkeypatch):
    monkeypatch.setattr("springtide.engine.engine.find_drafter", lambda name, folder: Tunable())
    policies = [engine.resolve("dense"), engine.resolve("streaming:budget=32")]
    found = evaluation.contenders(engine, {}, ["lookup"], policies, adaptive=False)
    assert [contender.engine.policy for contender in found] == policies
    for contender in found:
        assert contender.plain is contender.base
        assert contender.engine.stack is contender.plain.stack is engine.stack
        assert contender.engine.policy == contender.plain.policy
        assert contender.plain.drafter.name == "none"
        assert contender.engine.drafter.cost > 0
        assert contender.engine.adaptive is False
    rows = measured(found, cut(prompts=1), count=4)
    assert [(row.policy, row.budget) for row in rows] == [("dense", None), ("streaming", 32)]


def test_a_drafter_that_changes_the_model_is_compared_with_that_model(engine):
    other = springtide.load(tiny("llama", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())
    changed = {"medusa2": other.drafting(Tunable())}
    (contender,) = evaluation.contenders(engine, changed, ["medusa2"], [engine.policy], adaptive=True)
    assert contender.engine.stack is contender.plain.stack is other.stack
    assert contender.base.stack is engine.stack
    assert contender.plain.drafter.name == "none" and contender.engine.drafter.cost > 0
    assert contender.engine.adaptive is True
    pieces = cut(lengths=(64,), prompts=3)
    (row,) = measured([contender], pieces, count=6)
    assert row.outputs_equal == 1.0
    whole = [
        [list(perplexity(model, piece.context, [model.policy], 64, 1))[-1]()[0].perplexity for piece in pieces]
        for model in (other, engine)
    ]
    for got, values in zip((row.perplexity, row.base_perplexity), whole, strict=True):
        assert got == pytest.approx((values[0] * values[1] * values[2]) ** (1 / 3))
    assert row.perplexity != pytest.approx(row.base_perplexity)


# -- what is shown -------------------------------------------------------------------------------------------------


def test_table_and_picture(engine, tmp_path, capsys):
    pieces = cut(lengths=(300,), prompts=2, recall=2)
    rows = measured([against(engine, "nothing", Ends())], pieces, (0.0, 0.8), 6)
    evaluation.show(rows)
    shown = capsys.readouterr().out
    assert " T " in shown and "2/2" in shown and "recall" in shown
    assert "policy" not in shown and "perplexity" not in shown
    evaluation.plot(tmp_path / "out.png", rows)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
