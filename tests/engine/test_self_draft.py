"""The target drafts for itself: what it reads, what it leaves behind, and what is refused."""

from __future__ import annotations

import pytest
import torch

from drafters import VOCAB, hidden_transfer, medusa, self_draft
from springtide import kernels
from springtide.attention import parse_policy
from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.engine.drafters import find_drafter
from springtide.engine.engine import Engine
from springtide.engine.self_draft import SelfDraft
from springtide.errors import SpringtideError
from springtide.rows.sampling import Sampling
from stepping import passes
from tiny import random_tokens, tiny

PROMPT = random_tokens(60, vocab=VOCAB)
TIDAL = "tidal:budget=9,full=0,select=1"


def engine(drafter=None, policy="dense", **options):
    return Engine(tiny("qwen3", torch.float64, vocab_size=VOCAB, **options), None, policy, drafter, adaptive=False)


def complete(under, **options):
    request = under.start(PROMPT, Sampling(16, **options))
    list(under.run([request]))
    return request


@pytest.mark.parametrize(
    "policy", [TIDAL, "quest:budget=8,page=4,skip=1", "streaming:budget=9,sinks=2", "oracle:budget=9"]
)
def test_a_draft_is_what_the_sparse_policy_would_decode(policy):
    """One that chooses by itself, from the committed tokens on."""
    under = engine(self_draft(policy, select="own"))
    request = under.start(PROMPT, Sampling(16))
    for _ in passes(under, [request]):
        known = len(request.tokens)
        (tree,) = under.drafter.propose([request.view(4)])
        sparse = under.start(request.tokens, Sampling(4), policy=policy, draft=Drafter(), prefill=known - 1)
        list(under.run([sparse]))
        assert tree.tokens == sparse.tokens[known - 1 :] and tree.parents == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("inner", [Lookup(), medusa()], ids=["lookup", "medusa"])
@pytest.mark.parametrize("select", ["own", "verified"])
def test_a_drafter_below_changes_no_draft(inner, select):
    alone, over = engine(self_draft(TIDAL, select=select)), engine(self_draft(TIDAL, inner, select=select))
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        ways = [complete(under, **options) for under in (alone, over)]
        assert ways[0].output == ways[1].output == complete(engine(), **options).output
        assert [(way.passes, way.drafted, way.accepted) for way in ways[:1]] == [
            (way.passes, way.drafted, way.accepted) for way in ways[1:]
        ]


def test_a_budget_that_covers_the_context_drafts_what_is_accepted():
    for select in ("own", "verified"):
        request = complete(engine(self_draft("tidal:budget=999,full=0,select=1", select=select)))
        assert request.drafted == request.accepted > 8


@pytest.mark.parametrize("policy", [TIDAL, "oracle:budget=9,skip=1", "quest:budget=8,page=4,skip=1"])
def test_what_is_read_was_chosen_by_the_row_that_was_verified_last(policy, monkeypatch):
    """As the sparse policy chooses for that row, and all that came since; nothing is chosen while drafting."""
    under, read = engine(self_draft(policy)), []
    gathered = kernels.attend_gathered
    monkeypatch.setattr(
        kernels, "attend_gathered", lambda q, kv, index, *a, **o: read.append(index) or gathered(q, kv, index, *a, **o)
    )
    request = under.start(PROMPT, Sampling(16))
    for _ in passes(under, [request]):
        length = request.cache.length
        read.clear()
        under.drafter.propose([request.view(3)])
        drafted = list(read)
        row = under.start(request.tokens[:length], Sampling(1), policy=policy, draft=Drafter(), prefill=length - 1)
        read.clear()
        list(under.run([row]))
        # Tidal reads one choice everywhere. Others choose in each layer, where queries above the first sparse one are
        # of rows that read everything below.
        layers = len(read)
        assert len(drafted) == 3 * layers
        for step in range(3):
            since = torch.arange(length, length + step + 1).expand(1, read[0].shape[1], -1)
            for index in drafted[step * layers :][: layers if policy == TIDAL else 1]:
                assert torch.equal(index, torch.cat([read[0], since], 2))


def test_after_a_plain_pass_it_chooses_by_itself():
    under = engine(self_draft(TIDAL))
    request = under.start(PROMPT, Sampling(16))
    runs = passes(under, [request])
    next(runs)
    request.drafter = Drafter()
    next(runs)
    request.drafter = under.drafter
    own = engine(self_draft(TIDAL, select="own"))
    assert under.drafter.propose([request.view(4)]) == own.drafter.propose([request.view(4)])


@pytest.mark.parametrize("outer", ["dense", TIDAL])
@pytest.mark.parametrize(
    "drafter",
    [
        self_draft(TIDAL, select="own"),
        self_draft("quest:budget=8,page=4,skip=1"),
        self_draft("oracle:budget=9", hidden_transfer(0, 1, 1)),
    ],
    ids=["choosing by itself", "quest", "over hidden transfer"],
)
def test_the_output_is_as_without_it(drafter, outer):
    for options in ({}, {"temperature": 0.8, "seed": 1}):
        request = complete(engine(drafter, outer), **options)
        assert request.output == complete(engine(policy=outer), **options).output
        assert request.accepted


@torch.inference_mode()
def test_the_branch_leaves_nothing_behind():
    """Neither rows nor pages, and what it read is counted."""
    under = engine(self_draft(TIDAL, medusa()))
    request = under.start(PROMPT, Sampling(16))
    for _ in passes(under, [request]):
        pool, tables = under.stack.pool.used, dict(request.cache.tables)
        rows = [[x.clone() for x in request.cache.read(layer, 0, request.cache.length)] for layer in range(4)]
        known, read = list(request.tokens), request.decode_bytes
        draft = [under.drafter.propose([request.view(4)]) for _ in range(2)]
        assert draft[0] == draft[1]
        assert (under.stack.pool.used, request.cache.tables, request.tokens) == (pool, tables, known)
        assert all(
            torch.equal(was, now)
            for layer, own in enumerate(rows)
            for was, now in zip(own, request.cache.read(layer, 0, request.cache.length), strict=True)
        )
        assert request.decode_bytes > read


def test_a_fork_drafts_by_itself():
    under = engine(self_draft(TIDAL, Lookup()))
    request = under.start(PROMPT, Sampling(16))
    runs = passes(under, [request])
    next(runs)
    twin = request.fork()
    list(under.run([twin]))
    for _ in runs:
        pass
    assert twin.output == request.output and twin.passes == request.passes


def test_names():
    drafter = find_drafter("self:policy=(tidal:budget=256),tokens=8,draft=(lookup:ngram=3)", None)
    assert isinstance(drafter, SelfDraft) and drafter.tokens == 8
    assert (drafter.policy, drafter.draft) == (parse_policy("tidal:budget=256"), Lookup(ngram=3))
    assert find_drafter("self:draft=lookup", None).draft == Lookup()
    assert engine(find_drafter(f"self:policy=({TIDAL})", None)).drafter.policy.budget == 9


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("self:tokens=0", "self: tokens is 0, but it must be at least 1."),
        (
            "self:policy=dense",
            "self: the policy is dense, which leaves nothing out; give one that has a budget, such as",
        ),
        (
            f"self:policy=({TIDAL}),draft=self",
            "self: the drafter below it is 'self' again, which is one level too deep;",
        ),
        ("self:policy=nosuch", "Unknown policy 'nosuch': choose one of"),
        ("self:draft=nosuch", "There is no drafter 'nosuch': choose"),
        ("self:draft=medusa", "There is no drafter 'medusa' beside this model"),
        ("self:policy=tidal:budget=9", "A policy with options that is itself an option's value is written"),
        ("self:select=mine", "self: select is 'mine', but it must be one of verified, own."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(draft, message):
    with pytest.raises(SpringtideError) as caught:
        find_drafter(draft, None).resolve(engine().stack)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_policy_without_a_budget_is_refused():
    with pytest.raises(SpringtideError, match="leaves nothing out"):
        SelfDraft(Policy()).resolve(engine().stack)
