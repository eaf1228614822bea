"""Every drafter leaves the output, the cache and its neighbours as they are without it."""

from __future__ import annotations

from copy import copy
from functools import cache, partial

import pytest
import torch

from drafters import VOCAB, Letters, Turns, hidden_transfer, longspec, medusa, self_draft, several
from springtide.drafting.lookup import Lookup
from springtide.drafting.several import Several
from springtide.engine.engine import Engine
from springtide.engine.governor import Governor
from springtide.engine.loop import Loop
from springtide.rows.sampling import Sampling
from stepping import check_cache, passes, poison
from tiny import random_tokens, tiny

COUNT = 24
PROMPT = random_tokens(29, vocab=VOCAB)
PROMPTS = [PROMPT, *(random_tokens(length, seed=length, vocab=VOCAB) for length in (1, 6, 17, 40))]
TIDAL = "tidal:budget=7,full=0,select=1"
SAMPLINGS = {
    "temperature": {"temperature": 0.8, "seed": 1},
    "top-p": {"temperature": 1.0, "top_p": 0.8, "seed": 2},
    "top-k": {"temperature": 1.5, "top_k": 3, "seed": 3},
    "repetition penalty": {"temperature": 0.7, "repetition_penalty": 3.0, "seed": 4},
}


DRAFTERS = {
    "lookup": Lookup(),
    "medusa": medusa(shared=False),
    "medusa sharing the LM head": medusa(shared=True),
    "hidden transfer before selecting": hidden_transfer(0, 1, 1),
    "hidden transfer after selecting": hidden_transfer(2, 2, 3),
    "hidden transfer between selecting": hidden_transfer(1, 2, 3),
    "self under streaming over lookup": self_draft("streaming:budget=9,sinks=2", Lookup()),
    "self over medusa": self_draft(draft=medusa()),
    "longspec": longspec(),
    "longspec that reads little": longspec(cross=6),
    "several by turns": several(1, 2, 2),
}
CASES = {
    f"{name}, {policy.split(':')[0]}": (drafter, policy + ",reselect=3" * ("between" in name and policy == TIDAL))
    for name, drafter in DRAFTERS.items()
    for policy in ("dense", TIDAL)
}
every_drafter = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS.keys())
every_case = pytest.mark.parametrize(("drafter", "policy"), CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def turns(monkeypatch):
    monkeypatch.setattr("springtide.engine.engine.Governor", Turns)


def engine(policy, drafter=None, dtype=torch.float64, **overrides):
    """It drafts in every pass, but several drafters, and plain passes, take turns."""
    model = tiny("qwen3", dtype, vocab_size=VOCAB, **overrides)
    return Engine(model, Letters(), policy, drafter, adaptive=isinstance(drafter, Several))


def stepped(engine, batch):
    """Run a batch to its end, as the engine does; yields after every pass."""
    return passes(engine, batch, governor=Turns if engine.adaptive else None)


def complete(engine, prompt=PROMPT, count=COUNT, **options):
    sequence = engine.start(prompt, Sampling(count, **options))
    list(engine.run([sequence]))
    return sequence


@cache
def plain(policy, prompt=tuple(PROMPT), dtype=torch.float64, **options):
    """Output without a drafter."""
    return complete(engine(policy, dtype=dtype), list(prompt), **options).output


def figures(sequence):
    """What came out, and by which drafts."""
    return sequence.output, sequence.passes, sequence.drafted, sequence.accepted


# The output


@every_case
def test_greedy_is_as_without_a_drafter(drafter, policy):
    for prompt in PROMPTS[:2]:
        sequence = complete(engine(policy, drafter), prompt)
        assert sequence.output == plain(policy, tuple(prompt))
        assert 0 < sequence.accepted < sequence.drafted


def test_a_prompt_of_many_chunks_counts_no_drafts(monkeypatch):
    monkeypatch.setattr("springtide.engine.loop.CHUNK", 4)
    sequence = complete(engine("dense"))
    assert len(PROMPT) > 12 and (sequence.drafted, sequence.accepted) == (0, 0)
    assert sequence.output == plain("dense")


@every_case
@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_sampled_output_is_as_without_a_drafter(drafter, policy, options):
    accepted = 0
    for prompt in (PROMPT, PROMPTS[1]):  # in the second one tokens are new to the text, and then penalised
        sequence = complete(engine(policy, drafter), prompt, **options)
        assert sequence.output == plain(policy, tuple(prompt), **options)
        accepted += sequence.accepted
    assert accepted


@every_case
def test_ends_inside_a_branch(drafter, policy):
    """An end of sequence, a stop string, max_tokens and the context limit."""
    full = plain(policy, temperature=1.2)
    letters, inside = Letters().decode(full), 0
    for token in set(full):
        under = engine(policy, drafter)
        under.eos = frozenset([token])
        ended = complete(under, temperature=1.2)
        assert ended.output == full[: full.index(token) + 1] and ended.finish_reason == "stop"
        assert ended.cache.length == len(ended.tokens) - 1
        inside += ended.from_draft[-1]
    assert inside, "some ends were drafted, and what was drafted behind them is gone"

    inside = 0
    for at in range(1, COUNT - 2, 2):
        stop = letters[at : at + 2]
        ended = complete(engine(policy, drafter), temperature=1.2, stop=stop)
        assert ended.text == letters[: letters.index(stop)] and ended.finish_reason == "stop"
        assert ended.output == full[: letters.index(stop) + 2]
        assert ended.cache.length == len(ended.tokens) - 1
        inside += ended.from_draft[-1]
    assert inside

    for count in (1, 2, 3, 5, 8):
        ended = complete(engine(policy, drafter), count=count, temperature=1.2)
        assert ended.output == full[:count] and ended.finish_reason == "length"
        short = engine(policy, drafter, max_position_embeddings=len(PROMPT) + count)
        ended = complete(short, temperature=1.2)
        assert ended.output == full[:count] and ended.finish_reason == "length"


@every_case
@pytest.mark.parametrize("options", [{}, SAMPLINGS["temperature"]], ids=["greedy", "sampled"])
def test_in_a_ragged_batch_each_is_drafted_as_alone(drafter, policy, options):
    under = engine(policy, drafter)
    lengths = range(COUNT, 3, -5)  # they leave the batch one by one
    alone = [complete(under, prompt, count, **options) for prompt, count in zip(PROMPTS, lengths, strict=True)]
    batch = [under.start(s.tokens[: s.output_start], s.sampling) for s in alone]
    list(under.run(batch))
    assert [figures(sequence) for sequence in batch] == [figures(sequence) for sequence in alone]


@every_case
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-4)], ids=str)
def test_in_lower_precision_only_near_ties_are_decided_otherwise(drafter, policy, dtype, near):
    """``near``: how far apart, relative to the larger, two logits may be at the first token that differs."""
    under, gaps = engine(policy, drafter, dtype), []
    for prompt in PROMPTS:
        expected, got = plain(policy, tuple(prompt), dtype), complete(under, prompt).output
        first = next((i for i, pair in enumerate(zip(expected, got, strict=True)) if len({*pair}) > 1), None)
        if first is not None:
            *_, logits = engine(policy, None, dtype).predictions(prompt + expected[: first + 1], len(prompt))
            best, second = logits[-1].topk(2).values.tolist()
            gaps.append((best - second) / abs(best))
    assert all(gap <= near for gap in gaps), f"{len(gaps)} of {len(PROMPTS)} outputs diverge, at gaps of {gaps}"


# The cache


@every_drafter
def test_after_every_step_the_caches_are_those_of_fresh_prompts(drafter):
    under = engine("dense", drafter)
    batch = [under.start(prompt, Sampling(12, temperature=0.8)) for prompt in PROMPTS]
    for _ in stepped(under, batch):
        for sequence in batch:
            check_cache(under, sequence)
    assert all(sequence.accepted for sequence in batch)


@every_drafter
def test_after_every_pass_drafts_are_those_of_a_fresh_prompt(drafter):
    """What was rejected leaves no trace in what the drafter remembers. Of several it is the first one."""
    under = engine("dense", drafter)
    sequence, rejected = under.start(PROMPT, Sampling(COUNT)), 0
    for _ in passes(under, [sequence]):
        fresh = under.start(sequence.tokens[:-1], Sampling(COUNT))
        next(passes(under, [fresh]))
        assert fresh.tokens == sequence.tokens
        assert under.drafter.propose([sequence.view(9)]) == under.drafter.propose([fresh.view(9)])
        rejected += sequence.drafted > sequence.accepted
    assert rejected > 3


@every_case
def test_rejected_and_pseudo_rows_are_out_of_reach(drafter, policy):
    """Of the target, which would answer otherwise, and of the drafter, which would draft otherwise."""

    @torch.inference_mode()
    def run(value):
        """With ``value`` in all that is not committed."""
        under = engine(policy, drafter)
        sequence = under.start(PROMPT, Sampling(COUNT, temperature=0.8))
        for _ in stepped(under, [sequence]):
            length = sequence.cache.length
            for layer in range(under.stack.spec.num_layers):
                assert all(part.isfinite().all() for part in sequence.cache.read(layer, 0, length))
            poison(sequence.cache, under.stack.spec.num_layers, value)
        return figures(sequence)

    assert run(torch.nan) == run(0.0)


# Time


@every_case
def test_a_drafter_that_seems_slow_is_left_out_and_changes_nothing(drafter, policy, monkeypatch):
    now, drafted = 0.0, 0

    def clock():
        nonlocal now
        now += 1.0
        return now

    under = engine(policy, copy(drafter))
    under.adaptive, propose = True, under.drafter.propose
    monkeypatch.setattr("springtide.engine.engine.Governor", Governor)

    def slow(views):
        nonlocal now, drafted
        now, drafted = now + 10.0 * len(views), drafted + len(views)
        return propose(views)

    object.__setattr__(under.drafter, "propose", slow)
    monkeypatch.setattr("springtide.engine.engine.Loop", partial(Loop, clock=clock))
    monkeypatch.setattr("springtide.engine.governor.SHARE", 5.0)  # it is tried again soon
    options = {"count": 60, "temperature": 0.8}
    batch = [under.start(prompt, Sampling(60, temperature=0.8)) for prompt in PROMPTS[:2]]
    list(under.run(batch))
    assert [s.output for s in batch] == [plain(policy, tuple(prompt), **options) for prompt in PROMPTS[:2]]
    assert 0 < drafted < sum(sequence.passes for sequence in batch)
