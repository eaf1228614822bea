"""Prompts whose first rows are vectors at positions with gaps: as transformers has them, and exact as any others."""

import pytest
import torch

from guesses import Guesses
from springtide.drafting.lookup import Lookup
from springtide.engine import loop
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.rows.sampling import Sampling
from springtide.rows.segment import NO_TOKEN, PromptEmbeds
from tiny import random_tokens, tiny

POSITIONS = (0, 1, 4, 5, 6, 9, 13)
QUESTION = random_tokens(5, seed=1)
GREEDY = Sampling(max_tokens=24)
FULL_ATTENTION = ["llama", "qwen3", "phi3", "gemma2", "granite", "starcoder2"]


def embeds(seed=0, positions=POSITIONS, end=16, hidden=32):
    generator = torch.Generator().manual_seed(seed)
    return PromptEmbeds(torch.randn(len(positions), hidden, generator=generator), tuple(positions), end)


def prompt(given, question=QUESTION):
    return [NO_TOKEN] * len(given) + question


def complete(engine, given, sampling=GREEDY, question=QUESTION):
    sequence = engine.start(prompt(given, question), sampling, embeds=given)
    for _ in engine.run([sequence]):
        pass
    return sequence.output


def by_transformers(model, given, question, count):
    """Greedy tokens, every one from a whole forward pass."""
    tokens = list(question)
    for _ in range(count):
        own = model.model.embed_tokens(torch.tensor(tokens)) * getattr(model.config, "embedding_multiplier", 1.0)
        rows = torch.cat([given.vectors.to(own), own])[None]
        if model.config.model_type == "granite":
            rows = rows / model.config.embedding_multiplier  # which it applies itself
        positions = [*given.positions, *range(given.end, given.end + len(tokens))]
        # Given as a mask, since transformers takes gaps in positions for the ends of packed sequences.
        causal = torch.full((1, 1, len(positions), len(positions)), float("-inf"), dtype=rows.dtype).triu(1)
        with torch.inference_mode():
            logits = model(
                inputs_embeds=rows, position_ids=torch.tensor([positions]), attention_mask=causal, use_cache=False
            ).logits
        tokens.append(logits[0, -1].argmax().item())
    return tokens[len(question) :]


@pytest.mark.parametrize("name", FULL_ATTENTION)
def test_as_transformers(name):
    wide = {"sliding_window": 512} if name in ("phi3", "gemma2", "starcoder2") else {}
    model, given = tiny(name, torch.float64, **wide), embeds()
    assert complete(Engine(model), given) == by_transformers(model, given, QUESTION, GREEDY.max_tokens)


def test_positions_count():
    model, given = tiny("qwen3", torch.float64), embeds()
    near = PromptEmbeds(given.vectors, tuple(range(len(given))), len(given))
    assert complete(Engine(model), near) == by_transformers(model, near, QUESTION, GREEDY.max_tokens)
    assert complete(Engine(model), near) != complete(Engine(model), given)


def test_vectors_of_tokens_are_those_tokens():
    model = tiny("qwen3")
    tokens = random_tokens(9)
    given = PromptEmbeds(model.model.embed_tokens(torch.tensor(tokens)).detach(), tuple(range(9)), 9)
    plain = Engine(model).generate([*tokens, *QUESTION], max_tokens=24)
    assert complete(Engine(model), given) == plain.token_ids


@pytest.mark.parametrize("policy", ["dense", "tidal:budget=64,layout=paper", "quest:budget=64,page=4"])
@pytest.mark.parametrize("kind", ["oracle", "random", "mixed"])
def test_drafted_is_plain(policy, kind):
    model, given = tiny("qwen3", torch.float64), embeds()
    plain = complete(Engine(model, policy=policy), given)
    drafter = Guesses([prompt(given) + plain], kind)
    engine = Engine(model, policy=policy, drafter=drafter, adaptive=False)
    assert complete(engine, given) == plain
    assert kind != "oracle" or drafter.calls < len(plain)
    assert complete(Engine(model, policy=policy, drafter=Lookup(), adaptive=False), given) == plain


def test_sampling_is_the_same_drafted():
    model, given = tiny("qwen3", torch.float64), embeds()
    sampling = Sampling(max_tokens=24, temperature=0.9, seed=5)
    plain = complete(Engine(model), given, sampling)
    drafter = Guesses([prompt(given) + plain], "mixed")
    assert complete(Engine(model, drafter=drafter, adaptive=False), given, sampling) == plain


def test_rows_that_are_no_tokens_are_neither_penalised_nor_looked_up():
    """Token 0 is as any other: it was not seen, and did not follow itself."""
    model, given = tiny("qwen3", torch.float64), embeds()
    sequence = Engine(model).start(prompt(given), GREEDY, embeds=given)
    assert sequence.tokens == [NO_TOKEN] * len(given) + QUESTION and 0 not in sequence.seen
    assert sequence.seen.length == len(sequence.tokens)
    assert Engine(model).start([5] * len(given) + QUESTION, GREEDY, embeds=given).tokens == sequence.tokens
    state = Lookup().new_state()
    state.read([*sequence.tokens, 0])
    assert state.match([*sequence.tokens, 0]) == (0, [])


def test_a_budget_that_covers_all_is_dense():
    model, given = tiny("qwen3", torch.float64), embeds()
    assert complete(Engine(model, policy="tidal:budget=64,layout=paper"), given) == complete(Engine(model), given)


def test_batched_is_alone():
    model = tiny("qwen3", torch.float64)
    engine = Engine(model)
    several = [embeds(), embeds(1, (2, 3), 5), None, embeds(2, range(11), 30)]
    sequences = [engine.start(QUESTION if given is None else prompt(given), GREEDY, embeds=given) for given in several]
    for _ in engine.run(sequences):
        pass
    for sequence, given in zip(sequences, several, strict=True):
        alone = engine.generate(QUESTION, max_tokens=24).token_ids if given is None else complete(engine, given)
        assert sequence.output == alone


def test_chunked_is_whole(monkeypatch):
    engine, given = Engine(tiny("qwen3", torch.float64)), embeds()
    whole = complete(engine, given)
    for chunk in (1, 3, 7, 8):
        monkeypatch.setattr(loop, "CHUNK", chunk)
        assert complete(engine, given) == whole


def test_a_cache_is_reused_for_the_same_vectors_only():
    engine, given = Engine(tiny("qwen3", torch.float64)), embeds()
    first = engine.start(prompt(given), GREEDY, embeds=given)
    for _ in engine.run([first]):
        pass
    again = engine.start(prompt(given), GREEDY, embeds=given, reuse=first.fork())
    other = embeds(seed=1)
    fresh = engine.start(prompt(other), GREEDY, embeds=other, reuse=first.fork())
    assert again.cache.length == len(prompt(given)) - 1 and fresh.cache.length == 0
    for _ in engine.run([again, fresh]):
        pass
    assert again.output == first.output and fresh.output == complete(engine, other)


def test_gaps_count_towards_the_context():
    engine = Engine(tiny("qwen3", torch.float64))
    given = embeds(end=500)
    output = complete(engine, given, Sampling(max_tokens=100))
    assert 500 + len(QUESTION) + len(output) == 512
    with pytest.raises(SpringtideError, match="context holds 512"):
        complete(engine, embeds(end=507))


@pytest.mark.parametrize(
    ("given", "tokens", "words"),
    [
        (embeds(hidden=31), 9, "must be"),
        (PromptEmbeds(torch.zeros(2, 32), (0,), 1), 9, "must be"),
        (embeds(), 7, "token after"),
        (embeds(positions=(0, 2, 2)), 9, "ascend"),
        (embeds(positions=(-1, 2)), 9, "ascend"),
        (embeds(end=13), 9, "ascend"),
    ],
)
def test_vectors_that_do_not_fit(given, tokens, words):
    with pytest.raises(SpringtideError, match=words):
        Engine(tiny("qwen3")).start([0] * tokens, GREEDY, embeds=given)
