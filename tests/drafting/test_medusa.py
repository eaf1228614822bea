from __future__ import annotations

from copy import copy

import pytest
import torch
from torch.nn.functional import linear, one_hot, silu

from springtide.attention.policy import Policy
from springtide.drafting.drafter import View
from springtide.drafting.folder import check_base
from springtide.drafting.medusa import Heads, Medusa
from springtide.drafting.shape import MOST_NODES, Shape, expected, grow, typical
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.engine.loop import Loop
from springtide.errors import SpringtideError
from springtide.model.stack import Stack
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.sampling import Sampling
from tiny import BASE, random_tokens, tiny

HIDDEN, VOCAB = BASE["hidden_size"], BASE["vocab_size"]
PROMPT = random_tokens(29)
TIDAL = "tidal:budget=7,full=0,select=1"
every_form = pytest.mark.parametrize("shared", [False, True], ids=["full", "shared"])
every_policy = pytest.mark.parametrize("policy", ["dense", TIDAL, f"{TIDAL},correct=5"])


def model(name="qwen3", **overrides):
    return tiny(name, torch.float64, **overrides)


def random_heads(heads=3, layers=1, shared=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    lm_heads = None if shared else random(heads, VOCAB, HIDDEN)
    return Heads(random(layers, heads, HIDDEN, HIDDEN), random(layers, heads, HIDDEN), lm_heads)


def knowing_heads(engine, tokens, heads=3):
    """Heads that guess right after all but a few of ``tokens``, which there are no more of than dimensions."""
    with torch.inference_mode():
        hidden = engine.stack.model.model(torch.tensor([tokens])).last_hidden_state[0]
    known = hidden[-HIDDEN:]
    lm_heads = torch.zeros(heads, VOCAB, HIDDEN, dtype=torch.float64)
    for head in range(heads):
        after = tokens[len(tokens) - len(known) + head + 2 :]
        wanted = one_hot(torch.tensor(after), VOCAB) + 0.1 * torch.randn(len(after), VOCAB, dtype=torch.float64)
        lm_heads[head] = (torch.linalg.pinv(known[: len(after)]) @ wanted).T
    plain = Heads.fresh(heads, 1, HIDDEN).double()
    return Heads(plain.weight.data, plain.bias.data, lm_heads.clone())


def drafter(heads, **options):
    return Medusa(heads, VOCAB, **options)


def watched(engine, prompt=PROMPT, count=24, **options):
    """Generate, with the drafter's proposals: pairs of the tokens there were and the tree."""
    proposals, propose = [], engine.drafter.propose

    def spy(views):
        trees = propose(views)
        proposals.extend((list(view.tokens), tree) for view, tree in zip(views, trees, strict=True))
        return trees

    engine = engine.drafting(engine.drafter)
    object.__setattr__(engine.drafter, "propose", spy)
    return engine.generate(list(prompt), max_tokens=count, **options), proposals


# Heads


@every_form
@pytest.mark.parametrize("layers", [1, 2])
def test_heads_are_the_papers_formula(layers, shared):
    heads, hidden = random_heads(3, layers, shared), torch.randn(5, HIDDEN, dtype=torch.float64)
    target = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    logits = heads(hidden, lambda x: linear(x, target))
    assert logits.shape == (3, 5, VOCAB)
    for head in range(3):
        x = hidden
        for layer in range(layers):
            x = silu(linear(x, heads.weight[layer, head], heads.bias[layer, head])) + x
        torch.testing.assert_close(logits[head], linear(x, target if shared else heads.lm_heads[head]))
    torch.testing.assert_close(heads(hidden, lambda x: linear(x, target), 2), logits[:2])


@every_form
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
def test_heads_give_the_same_in_decoding_as_in_training(dtype, near, rows, shared):
    """Without gradients they use other kernels."""
    heads = random_heads(3, 2, shared, dtype)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    target = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    trained = heads(hidden, lambda x: linear(x, target))
    with torch.inference_mode():
        decoded = heads(hidden, lambda x: linear(x, target))
    assert trained.requires_grad and decoded.dtype == dtype
    assert (decoded - trained).abs().max() < near * trained.abs().max()


@every_form
@pytest.mark.parametrize("name", ["qwen3", "granite"])
def test_fresh_heads_guess_what_the_target_does(name, shared):
    stack = Stack(tiny(name))
    heads = Heads.fresh(4, 2, HIDDEN, None if shared else stack.model.lm_head.weight)
    normed = torch.randn(6, HIDDEN)
    with torch.inference_mode():
        guesses = heads(normed, stack.head).argmax(-1)
    assert (guesses == stack.head(normed).argmax(-1)).all()


# Drafts


@every_form
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite"])
def test_the_tree_is_filled_from_the_hidden_state_of_the_last_accepted_row(name, shared):
    engine = Engine(model(name), adaptive=False)
    output = engine.generate(PROMPT, max_tokens=24).token_ids
    heads = random_heads(shared=True) if shared else knowing_heads(engine, PROMPT + output)
    engine = engine.drafting(drafter(heads))
    out, proposals = watched(engine)
    assert out.token_ids == output
    shape = engine.drafter.shape
    for tokens, tree in proposals:
        with torch.inference_mode():
            normed = engine.stack.model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0, -1:]
            guesses = heads(normed, engine.stack.head)[:, 0].topk(shape.width).indices.tolist()
        assert tree == shape.fill(tokens[-1], guesses)


def propose(drafter, state):
    """A tree behind tokens 3 and 4."""
    (tree,) = drafter.propose([View([3, 4], 9, state, Cache(Pool(1)), Policy(), None)])
    return tree


def test_without_a_hidden_state_only_the_committed_token_is_proposed():
    ready = Engine(model()).drafting(drafter(random_heads())).drafter
    assert propose(ready, ready.new_state()) == TokenTree.single(4)


def test_a_tree_without_guesses_runs_no_heads():
    ready = Engine(model()).drafting(drafter(random_heads(), shape=Shape((-1,), (0,)))).drafter
    state = ready.new_state()
    state.hidden = torch.full((1, 5), torch.nan)  # of a size that no head takes
    assert propose(ready, state) == TokenTree.single(4)


@every_form
@pytest.mark.parametrize(
    ("name", "policy"), [("qwen3", "dense"), ("qwen3", TIDAL), ("qwen3", f"{TIDAL},correct=5"), ("gemma2", "dense")]
)
def test_greedy_is_as_without_a_drafter(name, policy, shared):
    plain = Engine(model(name), policy=policy)
    expected = plain.generate(PROMPT, max_tokens=32).token_ids
    assert plain.drafting(drafter(random_heads(shared=shared))).generate(PROMPT, max_tokens=32).token_ids == expected


@every_policy
def test_right_guesses_are_accepted_and_change_nothing(policy):
    plain = Engine(model(), policy=policy, adaptive=False)
    expected = plain.generate(PROMPT, max_tokens=24).token_ids
    drafted = plain.drafting(drafter(knowing_heads(plain, PROMPT + expected)))
    out = drafted.generate(PROMPT, max_tokens=24)
    assert out.token_ids == expected
    assert policy != "dense" or out.stats.passes <= 24 / 4 + 1, "four tokens a pass: one and those of three heads"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@every_policy
def test_a_batch_is_each_alone(policy, options):
    prompts = [PROMPT, PROMPT[5:], random_tokens(40, seed=4), random_tokens(3, seed=5)]
    plain = Engine(model(), policy=policy, adaptive=False)
    alone = [plain.generate(prompt, max_tokens=24, **options).token_ids for prompt in prompts]
    heads = knowing_heads(plain, PROMPT + plain.generate(PROMPT, max_tokens=24).token_ids)
    drafted = plain.drafting(drafter(heads))
    assert [drafted.generate(prompt, max_tokens=24, **options).token_ids for prompt in prompts] == alone
    assert [out.token_ids for out in drafted.generate(prompts, max_tokens=24, **options)] == alone


def test_a_batch_drafts_what_each_drafts_alone():
    prompts = [PROMPT, random_tokens(40, seed=4)]
    engine = Engine(model(), adaptive=False).drafting(drafter(random_heads()))
    alone = [engine.generate(prompt, max_tokens=16).stats for prompt in prompts]
    batch = [out.stats for out in engine.generate(prompts, max_tokens=16)]
    assert [(s.passes, s.drafted_tokens, s.accepted_tokens) for s in alone] == [
        (s.passes, s.drafted_tokens, s.accepted_tokens) for s in batch
    ]


def test_a_fork_drafts_for_itself():
    plain = Engine(model(), adaptive=False)
    expected = plain.generate(PROMPT, max_tokens=24).token_ids
    engine = plain.drafting(drafter(knowing_heads(plain, PROMPT + expected)))
    sequence = engine.start(PROMPT, Sampling(max_tokens=24))
    loop = Loop(engine.stack, engine.eos)
    for _ in range(3):
        loop.step([sequence])
    fork, before = sequence.fork(), copy(sequence.draft)
    while sequence.finish_reason is None:
        loop.step([sequence])
    assert fork.draft.hidden is before.hidden is not None
    while fork.finish_reason is None:
        loop.step([fork])
    assert fork.output == sequence.output == expected and fork.passes == sequence.passes


def test_a_second_turn_drafts_anew():
    plain = Engine(model(), adaptive=False)
    first = plain.generate(PROMPT, max_tokens=16).token_ids
    turn = PROMPT + first + random_tokens(5, seed=9)
    expected = plain.generate(turn, max_tokens=16).token_ids
    engine = plain.drafting(drafter(knowing_heads(plain, turn + expected)))
    sequence = engine.start(PROMPT, Sampling(max_tokens=16))
    list(engine.run([sequence]))
    again = engine.start(turn, Sampling(max_tokens=16), reuse=sequence)
    assert again.draft.hidden is None
    list(engine.run([again]))
    assert again.output == expected and again.passes <= 16 / 4 + 1


# Shapes


def test_the_shape_grows_from_what_was_measured_else_from_what_is_typical():
    stack = Stack(model())
    measured = [[0.9, 0.0], [0.9, 0.0], [0.9, 0.0]]
    assert drafter(random_heads(), accuracy=measured).resolve(stack).shape == Shape((-1, 0, 1, 2), (0, 0, 0, 0))
    assert drafter(random_heads()).resolve(stack).shape == grow(typical(3), 16)
    given = grow(typical(2), 5)
    assert drafter(random_heads(), accuracy=measured, shape=given).resolve(stack).shape == given


def test_tuning_weighs_what_rows_cost():
    ready = drafter(random_heads()).resolve(Stack(model()))
    assert ready.tuned(lambda rows: float(rows)).shape.parents == (-1,)
    assert len(ready.tuned(lambda rows: 1.0).shape.parents) == MOST_NODES
    middle = ready.tuned(lambda rows: 1 + 0.05 * rows).shape
    assert 1 < len(middle.parents) < MOST_NODES
    assert expected(typical(3), middle) / (1 + 0.05 * len(middle.parents)) > 1 / 1.05
    assert ready.target is ready.tuned(lambda rows: 1.0).target


# Models


def test_a_drafter_runs_in_the_targets_dtype_and_stays_as_it_was():
    own = drafter(random_heads(dtype=torch.bfloat16))
    ready = own.resolve(Stack(model()))
    assert {p.dtype for p in ready.heads.parameters()} == {torch.float64}
    assert {p.dtype for p in own.heads.parameters()} == {torch.bfloat16} and own.target is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 16}, "hidden states of size 16, but this model's is 32"),
        ({"vocab_size": 96}, "a vocabulary of 96, but this model's is 97"),
        ({"base": "0123456789abcdef"}, "was trained for another model of the same size"),
    ],
)
def test_another_models_drafter_is_refused(change, sentence):
    stack = Stack(model())
    config = {"drafter": "medusa", "hidden_size": HIDDEN, "vocab_size": VOCAB, "base": stack.fingerprint}
    check_base(config, stack)
    check_base(config | {"base": None}, stack)
    with pytest.raises(SpringtideError, match=sentence):
        check_base(config | change, stack)


def test_an_engine_refuses_another_models_drafter():
    with pytest.raises(SpringtideError, match="use a drafter that was trained for this model"):
        Engine(model(hidden_size=64), drafter=drafter(random_heads()))
    with pytest.raises(SpringtideError, match="another model of the same size"):
        Engine(model()).drafting(drafter(random_heads(), base="0123456789abcdef"))
    assert Engine(model(), drafter=drafter(random_heads())).drafter.base == Stack(model()).fingerprint
