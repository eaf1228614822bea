"""Hidden Transfer never changes the output, and its pseudo rows are the same wherever they are computed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.drafting.shape import Shape, grow
from springtide.engine.engine import Engine
from springtide.engine.governor import Governor
from springtide.engine.loop import Loop
from springtide.errors import SpringtideError
from springtide.model.stack import Stack
from springtide.rows.sampling import Sampling
from springtide.rows.segment import PREFIX, Segment
from tiny import random_tokens, tiny

VOCAB = 24
PROMPT = random_tokens(29, vocab=VOCAB)
TIDAL = "tidal:budget=7,full=0,select=1"
RESELECTING = "tidal:budget=7,full=0,select=1,reselect=2"
LAYERS = [(0, 0, 0), (1, 1, 1), (0, 1, 3), (2, 2, 3), (3, 3, 3)]  # before, at, between and after selecting layers
EVERY_CHILD = Shape(
    (PREFIX, *[0] * VOCAB, 1, VOCAB + 1), (0, *range(VOCAB), 0, 0)
)  # the first guessed token is always right

every_place = pytest.mark.parametrize("layers", LAYERS, ids=str)
every_policy = pytest.mark.parametrize("policy", ["dense", TIDAL, RESELECTING, f"{TIDAL},correct=5"])


def model(name="qwen3", **overrides):
    return tiny(name, torch.float64, **{"vocab_size": VOCAB} | overrides)


def drafter(layers=(1, 2, 2), shape=None, seed=0, **changes):
    """Random maps."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.eye(32) + 0.1 * torch.randn(len(layers), 32, 32, generator=generator)
    options = {"num_layers": 4, "vocab_size": VOCAB, "shape": shape} | changes
    return HiddenTransfer(weight, 0.1 * torch.randn(len(layers), 32, generator=generator), layers, **options)


@cache
def plain(policy="dense", name="qwen3", prompt=tuple(PROMPT), count=24, **options):
    """Output without a drafter."""
    return Engine(model(name), policy=policy).generate(list(prompt), max_tokens=count, **options).token_ids


def drafting(own, policy="dense", name="qwen3", **overrides):
    """An engine that drafts in every pass."""
    return Engine(model(name, **overrides), policy=policy, drafter=own, adaptive=False)


def run(engine, *segments):
    """Final hidden states of the planned rows of a pass, one tensor a segment."""
    return [own[: len(segment.tokens)] for own, segment in zip(all_rows(engine, *segments), segments, strict=True)]


def all_rows(engine, *segments):
    """The same, of pseudo rows too."""
    return engine.stack.forward(segments)


def prompt_segment(engine, tokens, outputs=1):
    options = {"outputs": outputs, "drafter": engine.drafter, "draft": engine.drafter.new_state()}
    return Segment.chain(
        engine.stack.new_cache(), 0, tokens, "prompt", engine.policy, state=engine.policy.new_state(), **options
    )


def pseudo_of(engine, tokens):
    """Final states ``[K, hidden]`` of the pseudo rows behind the last of ``tokens``, read as a prompt."""
    segment = prompt_segment(engine, tokens)
    (hidden,) = all_rows(engine, segment)
    engine.drafter.commit(segment, hidden, range(len(tokens)))
    return segment.draft.last


# The output


@every_policy
@every_place
def test_greedy_is_as_without_a_drafter(policy, layers):
    out = drafting(drafter(layers), policy).generate(PROMPT, max_tokens=24)
    assert out.token_ids == plain(policy)


@every_policy
def test_greedy_is_as_without_a_drafter_when_guesses_are_right(policy):
    out = drafting(drafter(shape=EVERY_CHILD), policy).generate(PROMPT, max_tokens=24)
    assert out.token_ids == plain(policy)
    assert "correct" in policy or out.stats.passes <= 24 / 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "mistral", "smollm3"])
def test_greedy_is_as_without_a_drafter_on_other_architectures(name):
    out = drafting(drafter(shape=EVERY_CHILD), name=name).generate(PROMPT, max_tokens=24)
    assert out.token_ids == plain(name=name)


@every_policy
def test_sampled_output_is_as_without_a_drafter(policy):
    options = {"temperature": 0.8, "seed": 1}
    for shape in (None, EVERY_CHILD):
        out = drafting(drafter(shape=shape), policy).generate(PROMPT, max_tokens=24, **options)
        assert out.token_ids == plain(policy, **options)


@every_policy
def test_a_batch_is_each_alone(policy):
    prompts = [random_tokens(length, seed=length, vocab=VOCAB) for length in (1, 6, 40)]
    for shape in (None, EVERY_CHILD):
        batch = drafting(drafter(shape=shape), policy).generate(prompts, max_tokens=12)
        assert [out.token_ids for out in batch] == [plain(policy, prompt=tuple(p), count=12) for p in prompts]


def test_a_long_prompt_is_read_in_chunks():
    prompt = tuple(random_tokens(1500, vocab=VOCAB))
    expected = Engine(model(max_position_embeddings=2048)).generate(list(prompt), max_tokens=8).token_ids
    assert drafting(drafter(), max_position_embeddings=2048).generate(list(prompt), max_tokens=8).token_ids == expected


def test_a_fork_goes_on_by_itself():
    engine = drafting(drafter(shape=EVERY_CHILD))
    sequence = engine.start(PROMPT, Sampling(max_tokens=24))
    loop = Loop(engine.stack, engine.eos)
    loop.step([sequence])
    twin = sequence.fork()
    for one in (sequence, twin):
        list(engine.run([one]))
        assert one.output == plain()


def test_passes_without_the_drafter_leave_it_nothing_to_propose():
    """As when drafting does not pay for a while."""

    class Turns(Governor):
        passes = 0

        def choose(self, sequences, context):
            return int(self.passes % 5 < 3)

        def record(self, tokens, seconds):
            self.passes += 1

    engine = drafting(drafter(shape=EVERY_CHILD))
    sequence = engine.start(PROMPT, Sampling(max_tokens=24))
    loop = Loop(engine.stack, engine.eos, Turns)
    while sequence.finish_reason is None:
        loop.step([sequence])
    assert sequence.output == plain() and 12 < sequence.passes < 23


# Rows


@every_place
@pytest.mark.parametrize(("name", "policy"), [("qwen3", "dense"), ("qwen3", RESELECTING), ("gemma2", "dense")])
def test_real_rows_are_as_without_pseudo_rows(name, policy, layers):
    """A tree, decoded, and a prompt beside it: final states, and what they leave in the cache."""
    found = []
    for own in (drafter(layers), Drafter()):
        engine = drafting(own, policy, name)
        first = prompt_segment(engine, PROMPT)
        run(engine, first)
        first.cache.commit(0, range(len(PROMPT)), exact=True)
        tree, state = [5, 6, 7, 8, 9, 10], engine.policy.new_state()
        options = {"outputs": len(tree), "drafter": engine.drafter, "draft": own.new_state()}
        parents = [PREFIX, 0, 0, 1, 2, 3]
        segment = Segment(first.cache, len(PROMPT), tree, parents, "verify", engine.policy, state, **options)
        other = prompt_segment(engine, PROMPT[:9])
        hidden = run(engine, segment, other)
        keys = [s.cache.read(layer, 0, s.prefix + len(s.tokens)) for s in (segment, other) for layer in range(4)]
        found.append([*hidden, *(part.clone() for pair in keys for part in pair)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral"])
def test_after_every_step_the_cache_and_the_pseudo_rows_are_those_of_a_fresh_prompt(name):
    engine = drafting(drafter(shape=EVERY_CHILD), name=name)
    loop = Loop(engine.stack, engine.eos)
    sequence = engine.start(PROMPT, Sampling(max_tokens=20))
    while sequence.finish_reason is None:
        loop.step([sequence])
        known = sequence.tokens[: sequence.cache.length]
        if sequence.finish_reason is None:
            torch.testing.assert_close(sequence.draft.last, pseudo_of(engine, known), atol=1e-10, rtol=0)
        fresh = prompt_segment(engine, known)
        engine.stack.forward([fresh])
        for layer in range(4):
            pairs = zip(sequence.cache.read(layer, 0, len(known)), fresh.cache.read(layer, 0, len(known)), strict=True)
            for got, expected in pairs:
                torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["prompt", "verify"])
def test_pseudo_rows_behind_each_node_are_those_behind_its_path(kind):
    engine = drafting(drafter((0, 2, 3)))
    tree, parents = [5, 6, 7, 8], [PREFIX, 0, 0, 2]
    first = prompt_segment(engine, PROMPT)
    run(engine, first)
    first.cache.commit(0, range(len(PROMPT)), exact=True)
    options = {"outputs": 4, "drafter": engine.drafter, "draft": first.draft}
    state = engine.policy.new_state()
    segment = Segment(first.cache, len(PROMPT), tree, parents, kind, engine.policy, state, **options)
    (hidden,) = all_rows(engine, segment)
    for node, path in enumerate([[5], [5, 6], [5, 7], [5, 7, 8]]):
        engine.drafter.commit(segment, hidden, [node])
        torch.testing.assert_close(first.draft.last, pseudo_of(engine, PROMPT + path), atol=1e-10, rtol=0)


def test_pseudo_rows_follow_one_another_and_read_the_context():
    """What map 2 makes depends on map 1's row, on the row it is made of, and on the whole context."""
    engine = drafting(drafter((1, 1)))
    before = pseudo_of(engine, PROMPT)
    other = replace(engine.drafter, weight=engine.drafter.weight.clone())
    other.weight[0] *= 1.1
    assert not torch.equal(pseudo_of(engine.drafting(other), PROMPT)[1], before[1])
    assert not torch.equal(pseudo_of(engine, [PROMPT[0] - 1, *PROMPT[1:]]), before)


@pytest.mark.parametrize(("shape", "rows"), [(Shape((PREFIX, 0, 1), (0, 0, 1)), 9), (Shape((PREFIX, 0), (0, 1)), 4)])
def test_only_as_many_steps_run_as_the_shape_has(shape, rows):
    seen = []

    class Spy(Policy):
        def reads(self, layer, q, segment):
            if layer.index == 3 and segment.decoding:
                seen.append(len(q))
            return super().reads(layer, q, segment)

    out = drafting(drafter(shape=shape), Spy()).generate(PROMPT, max_tokens=8)
    assert out.token_ids == plain()[:8]
    assert max(seen) == rows


def test_a_shape_of_one_node_is_plain_decoding():
    out = Engine(model(), drafter=drafter(shape=Shape((PREFIX,), (0,)))).generate(PROMPT, max_tokens=8)
    assert out.token_ids == plain()[:8] and out.stats.passes == 7


def test_the_tree_is_chosen_by_the_rows_it_costs():
    """At layers 1, 2 and 2 of 4, each node costs 1 + 3/4 + 1/2 + 1/2 rows."""
    accuracy, asked = [[0.9, 0.05], [0.8, 0.1], [0.5, 0.2]], []

    def cost(rows):
        asked.append(rows)
        return 10.0 if rows <= 4 * 2.75 else 1000.0

    tuned = drafter(accuracy=accuracy).tuned(cost)
    assert sorted({*asked} - {1})[:4] == [3, 6, 9, 11]
    assert tuned.shape == grow(accuracy, 4)


# Folders and models


def test_a_saved_drafter_is_loaded_as_it_was(tmp_path):
    before = drafter(accuracy=[[0.5, 0.25], [0.25, 0.125], [0.125, 0.0]], base=Stack(model()).fingerprint)
    before.save(tmp_path / "drafter")
    after = HiddenTransfer.load(tmp_path / "drafter")
    assert torch.equal(after.weight, before.weight.bfloat16()) and torch.equal(after.bias, before.bias.bfloat16())
    fields = ("layers", "num_layers", "vocab_size", "base", "accuracy")
    assert [getattr(after, name) for name in fields] == [getattr(before, name) for name in fields]
    assert drafting(after).generate(PROMPT, max_tokens=24).token_ids == plain()


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ({"hidden_size": 16}, "hidden states of size 32, but this model's is 16"),
        ({"vocab_size": 97}, "a vocabulary of 24, but this model's is 97"),
        ({"num_hidden_layers": 6}, "a model of 4 layers, but this one has 6"),
        ({}, "trained for another model of the same size"),
    ],
    ids=str,
)
def test_a_drafter_for_another_model_is_refused(target, fault):
    base = None if target else "0123456789abcdef"
    with pytest.raises(SpringtideError, match=fault):
        drafting(drafter(base=base), **target)


@pytest.mark.parametrize(
    "change",
    [{"layers": [1, 2]}, {"layers": [2, 1, 2]}, {"layers": [1, 2, 4]}, {"hidden_size": 64}, {"num_layers": None}],
)
def test_a_folder_whose_parts_do_not_fit_is_refused(tmp_path, change):
    drafter().save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SpringtideError, match="whose parts fit together"):
        HiddenTransfer.load(tmp_path)
