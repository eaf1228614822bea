"""Trials are what they say, and an answer is right when greedy decoding would have written it."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide import SpringtideError, facts
from springtide.attention import Tidal
from springtide.engine.engine import Engine
from springtide.evaluation.needle import DEPTHS, DIGITS, FACTS, Cell, Haystack, Trial, ask, needle, ratio, table
from springtide.rows.sampling import Sampling
from tiny import tiny

LENGTH = 420
LAYERS = {"full": (0,), "select": 1, "reselect": (3,)}
TIDAL = "tidal:budget=32,means=0,full=0,select=1,reselect=3"
POLICIES = ["dense", TIDAL, "quest:budget=64", "streaming:budget=64", "oracle:budget=9"]
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}{{ '<assistant>\n' }}"


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(tokenizer(), BOOK)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return springtide.load(tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())


def single(haystack: Haystack, length: int, number: int) -> Trial:
    return haystack.trial(length, number)


def length_of(trial: Trial) -> int:
    return len(trial.context) + max(len(question.tokens) + len(question.answer) for question in trial.questions)


@pytest.mark.parametrize("length", [300, LENGTH, 1000])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_context_longest_question_and_answer_have_the_length_exactly(haystack, length, number):
    assert length_of(haystack.trial(length, number)) == length


def test_every_fact_is_told_at_its_depth_and_only_there(haystack):
    trial = haystack.trial(1000, 3)
    text = tokenizer().decode(trial.context)
    assert [question.depth for question in trial.questions] == list(DEPTHS)
    for question in trial.questions:
        fact = facts.fact(question.word, question.digits)
        assert len(question.digits) == DIGITS and question.digits.isdigit()
        assert text.count(fact) == text.count(question.digits) == 1
        assert abs(text.index(fact) / len(text) - question.depth) < 0.1
    assert len({question.word for question in trial.questions}) == len(DEPTHS)


def test_distractors_are_facts_that_nobody_asks_about():
    trial = Haystack(tokenizer(), BOOK, distractors=7).trial(1000, 3)
    text = tokenizer().decode(trial.context)
    assert text.count(" The magic number for ") == len(DEPTHS) + 7
    assert len(trial.questions) == len(DEPTHS)
    assert length_of(trial) == 1000
    for question in trial.questions:
        fact = facts.fact(question.word, question.digits)
        assert text.count(fact) == text.count(f"for {question.word} is") == 1
        assert abs(text.index(fact) / len(text) - question.depth) < 0.2


def test_there_are_only_so_many_words(haystack):
    count = len(facts.WORDS)
    with pytest.raises(SpringtideError, match=f"words for {count} facts, but {count + 1} were asked for"):
        Haystack(tokenizer(), BOOK, distractors=count - len(DEPTHS) + 1).trial(LENGTH, 0)
    with pytest.raises(SpringtideError, match=f"words for {count} facts, but {count + 2} were asked for"):
        haystack.trial(LENGTH, 0, depths=[0.5] * (count + 2))
    with pytest.raises(SpringtideError, match="There can be 0 distractors or more, not -1"):
        Haystack(tokenizer(), BOOK, distractors=-1)


def test_facts_follow_the_end_of_a_sentence_where_one_is_near(haystack):
    text = tokenizer().decode(haystack.trial(1000, 3).context)
    before = [part[-1] for part in text.split(" The magic number for ")[:-1]]
    assert sum(character in ".!?" for character in before) >= 4


def test_questions_lead_up_to_the_digits(haystack):
    trial = haystack.trial(LENGTH, 0)
    question = trial.questions[2]
    asked = tokenizer().decode(question.tokens)
    assert asked == facts.question(question.word) + f" the magic number for {question.word} is"
    assert tokenizer().decode(question.answer) == f" {question.digits}"
    tokens, numbers = haystack.asked(trial)
    answers = tokenizer().decode([token for token, number in zip(tokens, numbers, strict=True) if number])
    assert answers == "".join(f" {q.digits}" for q in trial.questions)


def test_the_same_seed_gives_the_same_trial(haystack):
    assert haystack.trial(LENGTH, 4) == Haystack(tokenizer(), BOOK).trial(LENGTH, 4)
    others = [haystack.trial(LENGTH, 5), haystack.trial(LENGTH + 1, 4), Haystack(tokenizer(), BOOK, 1).trial(LENGTH, 4)]
    assert all(other.context != haystack.trial(LENGTH, 4).context for other in others)


def test_opening_tokens_come_first():
    backend = tokenizer().backend_tokenizer
    opened = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(backend.to_str()), bos_token="<s>")
    opened.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trial = Haystack(opened, BOOK).trial(LENGTH, 0)
    assert trial.context[0] == 0
    assert 0 not in trial.context[1:]
    assert all(0 not in question.tokens for question in trial.questions)
    assert length_of(trial) == LENGTH


@pytest.fixture(scope="module")
def turns() -> PreTrainedTokenizerFast:
    """A tokenizer whose template has a turn before the user's and one that answers."""
    own = copy(tokenizer())
    own.chat_template = "<system>Be short.</>" + TURNS
    return own


def test_in_a_chat_the_haystack_is_a_message_that_the_question_ends(turns):
    trial = Haystack(turns, BOOK, chat=True).trial(LENGTH, 0)
    context, question = turns.decode(trial.context), trial.questions[1]
    before = "<system>Be short.</><user>"
    assert context.startswith(before + FACTS)
    assert context.count("<") == 3
    for asked in trial.questions:
        assert context.count(facts.fact(asked.word, asked.digits)) == 1
    lead = f"</><assistant>\nthe magic number for {question.word} is"
    assert turns.decode(question.tokens) == facts.question(question.word) + lead
    assert turns.decode(question.answer) == f" {question.digits}"
    assert length_of(trial) == LENGTH
    messages = [{"role": "user", "content": context.removeprefix(before) + facts.question(question.word)}]
    rendered = turns.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert context + turns.decode(question.tokens) == rendered + f"the magic number for {question.word} is"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; ask without one"),
        ("{{ raise_exception('No.') }}", "does not take a question: No"),
        ("{% for m in messages %}{{ nosuch.field }}{% endfor %}", "does not take a question: 'nosuch' is undefined"),
        ("Hello", "writes a message 0 times instead of once"),
        (TURNS + TURNS, "writes a message 2 times instead of once"),
    ],
)
def test_templates_that_are_of_no_use(template, message):
    own = copy(tokenizer())
    own.chat_template = template
    with pytest.raises(SpringtideError, match=message):
        Haystack(own, BOOK, chat=True)


def written(engine: Engine, trial: Trial, policy: str, number: int, count: int) -> list[int]:
    """What greedy decoding writes after a question."""
    under, tokens = engine.using(policy), trial.context + trial.questions[number].tokens
    sequence = under.start(tokens, Sampling(max_tokens=count), prefill=len(trial.context))
    list(under.run([sequence]))
    return sequence.output


@pytest.mark.parametrize("policy", POLICIES)
def test_exact_is_what_greedy_decoding_writes(engine, haystack, policy):
    trial = haystack.trial(LENGTH, 0)
    first, second, third, *_ = trial.questions
    good = written(engine, trial, policy, 0, count=7)
    wrong = written(engine, trial, policy, 1, count=7)
    wrong[-1] = (wrong[-1] + 1) % VOCAB
    early = written(engine, trial, policy, 2, count=7)
    early[0] = (early[0] + 1) % VOCAB
    questions = [replace(first, answer=good), replace(second, answer=wrong), replace(third, answer=early)]
    questions.append(replace(first, answer=written(engine, trial, "dense", 0, count=7)))
    scores = ask(engine, Trial(trial.context, questions), [engine.resolve(policy)])[0]
    same = float(questions[3].answer == good)
    assert scores[:, 0].tolist() == [1, 0, 0, same]
    assert scores[[0, 3], 1].tolist() == [same, 1]
    assert same == (policy == "dense")


def one_at_a_time(engine: Engine, policy: str, tokens: list[int], prefill: int) -> torch.Tensor:
    """Predictions for every token after the prompt, from a sequence that is read anew for each of them."""
    rows = []
    for end in range(prefill + 1, len(tokens) + 1):
        rows.append(torch.cat(list(engine.using(policy).predictions(tokens[:end], prefill)))[-1])
    return torch.stack(rows).double().softmax(-1)


def test_scores_are_those_of_predictions_one_row_at_a_time(engine, haystack):
    """Dense is the reference, whether it is among the policies or not."""
    trial = haystack.trial(300, 2)
    question = trial.questions[3]
    # Two tokens that dense predicts, and two that it does not.
    answer = written(engine, trial, "dense", 3, count=2) + question.answer[:2]
    trial = Trial(trial.context, [replace(question, answer=answer)])
    tokens = trial.context + question.tokens + answer
    truth, *others = (one_at_a_time(engine, p, tokens, len(trial.context))[-4:] for p in POLICIES)
    scores = ask(engine, trial, [engine.resolve(policy) for policy in POLICIES[1:]])[:, 0]
    for own, (exact, dense, agreement, kl) in zip(others, scores.tolist(), strict=True):
        assert exact == float(own.argmax(-1).tolist() == answer)
        assert dense == float(truth.argmax(-1).tolist() == answer) == 0
        assert agreement == sum(own.argmax(-1) == truth.argmax(-1)).item() / 4
        assert kl == pytest.approx((truth * (truth / own).log()).sum().item() / 4, rel=1e-3)
        assert kl > 0.01
    assert 0 < scores[:, 2].mean() < 1
    both = ask(engine, trial, [engine.resolve(policy) for policy in POLICIES])[:, 0]
    assert both[0].tolist() == [0, 0, 1, 0]
    assert torch.allclose(both[1:], scores, rtol=1e-4)


def test_one_question_does_not_touch_another(engine, haystack):
    trial = haystack.trial(300, 0)
    policies = [engine.resolve(policy) for policy in POLICIES]
    together = ask(engine, trial, policies)
    for at in (1, 4):
        alone = ask(engine, Trial(trial.context, [trial.questions[at]]), policies)
        assert torch.allclose(alone[:, 0], together[:, at], rtol=1e-4, atol=1e-9)


def test_a_ratio_and_its_error_are_those_of_the_jackknife():
    """For means the two are equal; for ratios nearly, with many contexts."""
    x = torch.tensor([0.0, 1.0, 1.0, 0.25, 0.75], dtype=torch.float64)
    assert ratio(x, torch.ones(5)) == (pytest.approx(0.6), pytest.approx((0.825 / 4 / 5) ** 0.5))
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(400, 5, generator=generator) < 0.7).double()
    x = (y * (torch.rand(400, 5, generator=generator) < 0.8)).mean(1)
    y = y.mean(1)
    left_out = (x.sum() - x) / (y.sum() - y)
    jackknife = (399 / 400 * (left_out - left_out.mean()).square().sum()).sqrt()
    value, error = ratio(x, y)
    assert value == pytest.approx((x.sum() / y.sum()).item())
    assert error == pytest.approx(jackknife.item(), rel=0.01)
    assert ratio(y, y) == (1.0, 0.0)
    assert ratio(x[:1], torch.ones(1)) == (x[0].item(), None)


# What a policy makes of two contexts with questions at depths 0.1, 0.5, 0.5: exact, dense's exact, agreement, KL.
SCORES = [
    [[1, 1, 1.0, 0.1], [0, 1, 0.5, 0.3], [0, 0, 0.5, 0.2]],
    [[0, 1, 0.0, 0.5], [1, 1, 1.0, 0.0], [1, 0, 0.5, 0.4]],
]


def cells_of(engine, monkeypatch, scores) -> list[Cell]:
    """Cells of the trials that these are the scores of, under one policy."""
    rows = iter(scores)
    monkeypatch.setattr("springtide.evaluation.needle.ask", lambda *_: torch.tensor([next(rows)], dtype=torch.float64))

    def task(haystack, length, number):
        return haystack.trial(length, number, depths=[0.1, 0.5, 0.5])

    policies = [engine.resolve(Tidal(budget=32, **LAYERS))]
    steps = list(needle(engine, Haystack(tokenizer(), BOOK), {"made": task}, policies, [LENGTH], len(scores)))
    assert len(steps) == len(scores)
    return steps[-1]()


def test_cells_of_scores_that_are_known(engine, monkeypatch):
    first, second, both = cells_of(engine, monkeypatch, SCORES)
    for cell, depth, questions in ((first, 0.1, 2), (second, 0.5, 4), (both, None, 6)):
        assert (cell.policy, cell.budget, cell.length, cell.task) == ("tidal", 32, LENGTH, "made")
        assert (cell.depth, cell.questions) == (depth, questions)
    # Contexts have 1 and 0 of the first depth's questions right, 0 and 1 of the second's, 1/3 and 2/3 of all.
    assert [cell.exact_match for cell in (first, second, both)] == [0.5, 0.5, 0.5]
    assert [cell.exact_match_se for cell in (first, second)] == [pytest.approx(0.5)] * 2
    assert both.exact_match_se == pytest.approx(1 / 6)
    # Dense has all of the first depth's right, half of the second's and two thirds of all, in every context.
    assert [cell.of_dense for cell in (first, second, both)] == [pytest.approx(v) for v in (0.5, 1.0, 0.75)]
    assert [cell.of_dense_se for cell in (first, second, both)] == [pytest.approx(v) for v in (0.5, 1.0, 0.25)]
    assert (both.agreement, both.agreement_se) == (pytest.approx(3.5 / 6), pytest.approx(1 / 12))
    assert (first.kl, first.kl_se) == (pytest.approx(0.3), pytest.approx(0.2))
    assert (both.kl, both.kl_se) == (pytest.approx(0.25), pytest.approx(0.05))


def test_cells_of_one_context_without_dense_answers(engine, monkeypatch):
    cells = cells_of(engine, monkeypatch, [[[1, 0, 1.0, 0.1], [0, 0, 0.5, 0.3], [0, 0, 0.5, 0.2]]])
    assert [cell.of_dense for cell in cells] == [None] * 3
    for name in ("exact_match_se", "of_dense_se", "agreement_se", "kl_se"):
        assert [getattr(cell, name) for cell in cells] == [None] * 3


def test_table(engine, monkeypatch):
    cells = cells_of(engine, monkeypatch, SCORES)
    cells[0] = replace(cells[0], exact_match=0.25)
    row = {"task": "made", "policy": "tidal", "budget": 32, "length": LENGTH, "questions": 6, "worst_depth": 0.25}
    row |= {"exact": "0.500±0.167", "of_dense": "0.750±0.250", "agree": "0.583±0.083", "KL": "0.2500±0.0500"}
    assert table(cells) == [row]
    lone = replace(cells[2], of_dense=None, of_dense_se=None, kl_se=None)
    rows = table([*cells, lone])
    assert rows[0] == row
    assert rows[1] == row | {"of_dense": "-", "KL": "0.2500", "worst_depth": 0.5}


def test_cells(engine, haystack):
    policies = [engine.policy, engine.resolve(Tidal(budget=32, **LAYERS))]
    steps = list(needle(engine, haystack, {"single": single, "again": single}, policies, [LENGTH, 500], trials=2))
    assert len(steps) == 8
    cells = steps[-1]()
    assert len(cells) == 2 * 2 * 2 * (len(DEPTHS) + 1)
    assert {(c.policy, c.budget) for c in cells} == {("dense", None), ("tidal", 32)}
    assert {(c.length, c.task) for c in cells} == {(n, task) for n in (LENGTH, 500) for task in ("single", "again")}
    assert {(c.depth, c.questions) for c in cells} == {*((depth, 2) for depth in DEPTHS), (None, 10)}
    assert all((c.kl, c.agreement, c.kl_se) == (0, 1, 0) for c in cells if c.policy == "dense")
    assert all(c.kl > 0 for c in cells if c.policy == "tidal")


def test_cells_of_what_is_done_so_far(engine, haystack):
    policies = [engine.policy, engine.resolve(Tidal(budget=32, **LAYERS))]
    steps = needle(engine, haystack, {"single": single}, policies, [LENGTH, 500], trials=2)
    for done, cells in enumerate(steps, start=1):
        lengths = [LENGTH] if done <= 2 else [LENGTH, 500]
        assert list(dict.fromkeys(cell.length for cell in cells())) == lengths
        assert {cell.questions for cell in cells() if cell.depth and cell.length == lengths[-1]} == {(done - 1) % 2 + 1}


def test_variants_of_a_policy_have_names_of_their_own(engine, haystack):
    variants = [Tidal(budget=32, heads=heads, **LAYERS) for heads in ("kv", "all")]
    (found,) = needle(engine, haystack, {"single": single}, variants, [LENGTH], trials=1)
    cells = found()
    assert {cell.policy for cell in cells} == {"tidal:heads=kv", "tidal:heads=all"}
    assert len(table(cells)) == 2


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([LENGTH, 60], "context of 60 tokens is too short for 5 facts"),
        ([LENGTH, 1024], "takes 1025 tokens with questions and answers, but the model's context holds 1024"),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_any_work(engine, haystack, lengths, message, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("worked"))
    with pytest.raises(SpringtideError, match=message):
        list(needle(engine, haystack, {"single": single}, [engine.policy], lengths, trials=1))


def test_the_longest_length_that_fits(engine, haystack):
    (found,) = needle(engine, haystack, {"single": single}, [engine.policy], [1023], trials=1)
    assert len(found()) == 6


def test_a_text_too_short(engine):
    with pytest.raises(SpringtideError, match=r"The text has .* tokens, but a context of 420 needs"):
        Haystack(tokenizer(), "Too short.").trial(LENGTH, 0)
