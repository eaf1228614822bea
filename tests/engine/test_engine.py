"""What the engine does with prompts, conversations and their options, good and bad."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import springtide
from folders import PROMPT, VOCAB, tokenizer
from guesses import Guesses
from springtide import SpringtideError
from springtide.attention import Tidal
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from tiny import random_tokens, tiny


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return springtide.load(folder)


def test_prompts_may_be_text_or_ids_one_or_many(engine):
    ids = engine.encode(PROMPT)
    one = engine.generate(PROMPT, max_tokens=5)
    assert engine.generate(ids, max_tokens=5).token_ids == one.token_ids
    for many in ([PROMPT, PROMPT], [ids, ids], [PROMPT, ids]):
        assert [output.token_ids for output in engine.generate(many, max_tokens=5)] == [one.token_ids] * 2
    assert [output.token_ids for output in engine.generate([PROMPT], max_tokens=5)] == [one.token_ids]
    assert engine.generate(torch.tensor(ids), max_tokens=5).token_ids == one.token_ids
    assert engine.generate(torch.tensor([ids]), max_tokens=5)[0].token_ids == one.token_ids
    assert engine.generate([], max_tokens=5) == []


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(engine):
    prompts = [random_tokens(n, seed=n, vocab=VOCAB) for n in (1, 40, 7, 600)]
    alone = [engine.generate(prompt, max_tokens=8).token_ids for prompt in prompts]
    assert [output.token_ids for output in engine.generate(prompts, max_tokens=8)] == alone


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ("e", "a")}])
def test_a_stream_is_the_text_in_pieces(engine, options):
    options = {"max_tokens": 24, **options}
    pieces = list(engine.stream(PROMPT, **options))
    assert all(pieces)
    assert "".join(pieces) == engine.generate(PROMPT, **options).text


def test_stop_strings_end_the_text_before_them(engine):
    whole = engine.generate(PROMPT, max_tokens=24).text
    stop = whole[7:10]
    output = engine.generate(PROMPT, max_tokens=24, stop=stop)
    assert output.text == whole[: whole.index(stop)]
    assert output.finish_reason == "stop"
    assert len(output.token_ids) < 24
    with pytest.raises(SpringtideError, match="no tokenizer"):
        springtide.load(tiny("qwen3")).generate(random_tokens(5), stop="a")


def test_tokens_drafted_beyond_a_stop_string_are_dropped(engine):
    ids = engine.encode(PROMPT)
    whole = engine.generate(ids, max_tokens=24)
    drafted = Engine(engine.stack.model, tokenizer(), drafter=Guesses([[*ids, *whole.token_ids]], "oracle", size=6))
    assert drafted.generate(ids, max_tokens=24).token_ids == whole.token_ids
    for at in range(2, 20, 3):
        options = {"max_tokens": 24, "stop": whole.text[at : at + 2]}
        expected, output = engine.generate(ids, **options), drafted.generate(ids, **options)
        assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
        assert output.finish_reason == expected.finish_reason == "stop"


def test_end_of_sequence_ends_the_output(folder):
    engine = springtide.load(folder)
    ids = engine.generate(PROMPT, max_tokens=12).token_ids
    engine.eos = frozenset([ids[4]])
    output = engine.generate(PROMPT, max_tokens=12)
    assert output.token_ids == ids[: ids.index(ids[4]) + 1]
    assert output.finish_reason == "stop"
    assert engine.generate(PROMPT, max_tokens=12, ignore_eos=True).token_ids == ids


def test_the_context_limit_ends_the_output(engine):
    output = engine.generate(random_tokens(1020, vocab=VOCAB), max_tokens=50)
    assert (len(output.token_ids), output.finish_reason) == (4, "length")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ([[]], {}, "prompt is empty"),
        ([PROMPT, ""], {}, "prompt is empty"),
        ([0, VOCAB], {}, f"between 0 and {VOCAB - 1}"),
        ([-1], {}, "between 0 and"),
        ([5] * 1024, {}, "1024 tokens, but the model's context holds 1024"),
        ([0.5, 1.5], {}, "text or a list of token ids"),
        ([3, "x"], {}, "text or a list of token ids"),
        ("bytes \udcff", {}, "not UTF-8"),
        (PROMPT, {"max_tokens": 0}, "max_tokens must be at least 1"),
        (PROMPT, {"temperature": "a"}, "temperature is 'a', but it must be a number"),
        (PROMPT, {"top_k": 1.5}, "top_k is 1.5, but it must be a whole number"),
        (PROMPT, {"top_p": [1]}, "but it must be a number"),
        (PROMPT, {"logprobs": 1.5}, "logprobs is 1.5, but it must be a whole number"),
        (PROMPT, {"stop": 5}, "stop is 5, but it must be a text, or several"),
        (PROMPT, {"stop": ["a", 5]}, "but it must be a text, or several"),
        (PROMPT, {"stop": ""}, "a stop string must not be empty"),
        (PROMPT, {"max_length": 5}, "Unknown generation option 'max_length'; the options are: max_tokens, temperature"),
    ],
)
def test_bad_requests(engine, prompt, options, message):
    with pytest.raises(SpringtideError, match=message):
        engine.generate(prompt, **options)


def test_chat(engine):
    messages = [{"role": "user", "content": "What is it?"}]
    assert engine.encode("\n\nQuestion: What is it? Answer:") == engine.render(messages)
    output = engine.chat(messages, max_tokens=4)
    assert output.token_ids == engine.generate(engine.render(messages), max_tokens=4).token_ids


def test_chat_that_cannot_be(engine):
    with pytest.raises(SpringtideError, match=r"does not take these messages: .*empty"):
        engine.chat([])
    with pytest.raises(SpringtideError, match="not UTF-8"):
        engine.chat([{"role": "user", "content": "\udcff"}])
    for messages in ("Hello", [{"role": "user"}], ["Hello"]):
        with pytest.raises(SpringtideError, match="Messages are a list"):
            engine.chat(messages)
    plain = AutoTokenizer.from_pretrained(engine.stack.model.name_or_path)
    plain.chat_template = None
    with pytest.raises(SpringtideError, match="no chat template"):
        springtide.load(engine.stack.model, plain).chat([{"role": "user", "content": "Hi"}])
    plain.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(SpringtideError, match="does not take these messages: System role not supported"):
        springtide.load(engine.stack.model, plain).chat([{"role": "system", "content": "Hi"}])


def test_policies_by_name_and_as_objects(engine):
    prompt = random_tokens(80, vocab=VOCAB)
    layers = {"full": (0,), "select": 1}
    named = engine.using("tidal:budget=16,full=0,select=1").generate(prompt, max_tokens=8)
    assert engine.using(Tidal(budget=16, **layers)).generate(prompt, max_tokens=8).token_ids == named.token_ids
    dense = engine.generate(prompt, max_tokens=8)
    assert named.stats.kv_bytes_per_token < dense.stats.kv_bytes_per_token
    covering = engine.using(Tidal(budget=500, **layers)).generate(prompt, max_tokens=8)
    assert covering.token_ids == dense.token_ids


# Options of each prompt

LONG = random_tokens(80, vocab=VOCAB)
TIDAL = "tidal:budget=16,full=0,select=1"


class Asked(Lookup):
    """Counts the views that it is shown."""

    views = 0

    def propose(self, views):
        Asked.views += len(views)
        return super().propose(views)


def test_every_prompt_may_have_a_policy_and_a_drafter_of_its_own(engine):
    policies, drafters = ["dense", TIDAL, "streaming:budget=8"], [Asked(), "lookup", None]
    expected = [engine.generate(LONG, policy=policy, max_tokens=8).token_ids for policy in policies]
    assert len({*map(tuple, expected)}) > 1
    got = engine.generate([LONG] * 3, policy=policies, draft=drafters, max_tokens=8)
    assert [output.token_ids for output in got] == expected
    assert Asked.views == 7, "of one prompt, after its first token"
    same = engine.generate([LONG] * 2, policy=TIDAL, draft="lookup", max_tokens=8)
    assert [output.token_ids for output in same] == [expected[1]] * 2
    assert engine.generate(LONG, policy=[TIDAL], max_tokens=8).token_ids == expected[1]
    assert engine.generate([], policy=[]) == []


def test_a_stream_and_a_chat_take_the_same_options(engine):
    options = {"policy": TIDAL, "draft": "lookup", "max_tokens": 12}
    assert "".join(engine.stream(LONG, **options)) == engine.generate(LONG, **options).text
    messages = [{"role": "user", "content": PROMPT * 9}]
    assert engine.chat(messages, **options).token_ids == engine.generate(engine.render(messages), **options).token_ids


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([LONG] * 3, {"policy": ["dense", TIDAL]}, "policy has 2 values, but there are 3 prompts; give one for each"),
        ([LONG], {"draft": []}, "draft has 0 values, but there are 1 prompts"),
        (LONG, {"policy": ["dense"] * 2}, "policy has 2 values, but there are 1 prompts"),
        ([], {"policy": ["dense"]}, "policy has 1 values, but there are 0 prompts"),
        ([LONG] * 2, {"policy": ["dense", "dens"]}, "Unknown policy 'dens': choose one of dense, tidal"),
        ([LONG] * 2, {"draft": ["lookup", "lokup"]}, "There is no drafter 'lokup': choose"),
        ([LONG] * 2, {"policy": ["dense", 3]}, "A policy is text such as 'tidal:budget=256', or a Policy, but not 3"),
        ([LONG, [], LONG], {}, "The prompt is empty"),
        ([LONG, LONG], {"polic": "dense"}, "Unknown generation option 'polic'"),
        ([LONG, None], {}, "A prompt is text or a list of token ids"),
        (None, {}, "Prompts are a text, a list of token ids, or a list of such prompts"),
        (5, {}, "Prompts are a text, a list of token ids, or a list of such prompts"),
        (torch.tensor(5), {}, "Prompts are a text, a list of token ids, or a list of such prompts"),
        (b"ab", {}, "A prompt is text or a list of token ids"),
        (LONG, {"n": 0}, "n is 0, but it must be at least 1"),
        (LONG, {"n": 1.5}, "n is 1.5, but it must be a whole number"),
        (LONG, {"n": "2"}, "n is '2', but it must be a whole number"),
        (LONG, {"n": 2, "seed": "a"}, "seed is 'a', but it must be a whole number"),
        (LONG, {"n": 2, "seed": None}, "seed is None, but it must be a whole number"),
        (LONG, {"n": 2, "seed": 2**63 - 1}, "seed must be a whole number of 64 bits"),
    ],
)
def test_one_bad_prompt_or_option_of_a_list_and_none_is_begun(engine, monkeypatch, prompts, options, message):
    monkeypatch.setattr(engine.stack, "forward", lambda segments: pytest.fail("a pass was made"))
    with pytest.raises(SpringtideError, match=message):
        engine.generate(prompts, **options)


@pytest.mark.parametrize("tokens", ["text", b"ab", None, [1.5], torch.tensor(3)])
def test_tokens_that_are_none_are_not_scored(engine, tokens):
    with pytest.raises(SpringtideError, match="A prompt is text or a list of token ids"):
        engine.score(tokens, 1)


@pytest.mark.parametrize("name", ["generate", "stream", "chat"])
def test_options_that_do_not_exist(engine, name):
    prompt = [{"role": "user", "content": "Hi"}] if name == "chat" else PROMPT
    for options in ({"temprature": 1}, {"sampling": springtide.Sampling(), "temprature": 1}):
        with pytest.raises(
            SpringtideError, match="Unknown generation option 'temprature'; the options are: max_tokens"
        ):
            getattr(engine, name)(prompt, **options)


def test_options_go_before_those_of_the_sampling(engine):
    sampling = springtide.Sampling(max_tokens=9, stop=("zzz",), temperature=0.8)
    got = engine.start(LONG, sampling, max_tokens=3).sampling
    assert (got.max_tokens, got.stop, got.temperature) == (3, ("zzz",), 0.8)


# Caches that are taken over


@pytest.mark.parametrize("policies", [("dense", "dense"), (TIDAL, "dense"), ("dense", TIDAL)], ids=str)
def test_a_cache_is_taken_over_once(engine, policies):
    """Whoever comes second, and whom it belonged to, read their prompts themselves."""
    first, second = [*LONG, 5, 6], [*LONG, 7]
    alone = [
        engine.generate(p, policy=own, max_tokens=9).token_ids for p, own in zip((first, second), policies, strict=True)
    ]
    for reader in (engine.read(LONG), engine.start(LONG, max_tokens=4)):
        outputs = engine.generate([first, second], policy=list(policies), reuse=reader, max_tokens=9)
        assert [output.token_ids for output in outputs] == alone
        assert reader.cache.length == 0


@pytest.mark.parametrize("policy", ["dense", TIDAL, f"{TIDAL},correct=2"])
def test_one_that_runs_may_lose_its_cache(engine, policy):
    options = {"policy": policy, "max_tokens": 12}
    session = engine.session()
    loser = session.admit(engine.start(LONG, draft="lookup", **options))
    for _ in range(5):
        session.step()
    conversation = [*loser.tokens, 9]
    winner = session.admit(engine.start(conversation, reuse=loser, **options))
    assert winner.cache.length >= len(LONG)
    list(session.run())
    assert loser.output == engine.generate(LONG, **options).token_ids
    assert winner.output == engine.generate(conversation, **options).token_ids


# Predictions


@pytest.mark.parametrize("prefill", [0, -1, 80, 81])
def test_there_must_be_a_prompt_and_something_to_predict(engine, prefill):
    for call in (engine.score, lambda *about: list(engine.predictions(*about))):
        with pytest.raises(SpringtideError, match=f"prefill is {prefill}, but it must be between 1 and 79"):
            call(LONG, prefill)


def test_scores_are_those_of_the_output_beside_anything_else(engine):
    output = engine.generate(LONG, max_tokens=6).token_ids
    tokens = LONG + output
    scores = engine.score(tokens, len(LONG))
    assert scores.shape == (6,)
    for at, logits in enumerate(torch.cat(list(engine.predictions(tokens, len(LONG))))):
        assert int(logits.argmax()) == output[at]
        assert scores[at] == pytest.approx(float(logits.log_softmax(-1)[output[at]]), abs=1e-5)


def test_scoring_leaves_nothing_behind(engine):
    drafters = dict(engine._drafters)
    for _ in range(3):
        engine.score(LONG, 70)
        engine.read(LONG[:9])
    assert engine._drafters == drafters
