"""Sampling against transformers' own filters, and against the distribution that it claims to draw from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from springtide.errors import SpringtideError
from springtide.rows import sampling as module
from springtide.rows.sampling import Place, Sampling, Seen, distribution, gumbel, noise_keys
from statistic import g_test

seeds = st.integers(0, 2**31)
int64s = st.integers(-(2**63), 2**63 - 1)


def at(position=0, history=(), **options):
    """The place at ``position``, after ``history``."""
    return Place(Sampling(**options), Seen([-1] * (position - len(history)) + list(history)))


def sample(logits, *args, **options):
    return module.sample(logits[None], [at(*args, **options)])[0]


def filtered(logits, **options):
    return distribution(logits[None], [at(**{"temperature": 1.0, **options})])[0]


def noise(size, seed, position):
    keys = noise_keys([at(position, seed=seed)], torch.device("cpu"))
    return gumbel(keys[:, None], torch.arange(size))[0]


def random_logits(seed, size=50):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(size, generator=generator, dtype=torch.float64)


def by_transformers(logits, *processors, history=()):
    """Log-probabilities after transformers' processors."""
    return LogitsProcessorList(processors)(torch.tensor([list(history)]), logits[None])[0].log_softmax(-1)


def assert_same(got, expected):
    assert torch.equal(got.isinf(), expected.isinf())
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 60))
def test_top_k(seed, k):
    logits = random_logits(seed)
    assert_same(filtered(logits, top_k=k), by_transformers(logits, TopKLogitsWarper(k)))


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.01, 0.999))
def test_top_p(seed, p):
    logits = random_logits(seed)
    assert_same(filtered(logits, top_p=p), by_transformers(logits, TopPLogitsWarper(p)))


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.001, 1))
def test_min_p(seed, p):
    logits = random_logits(seed)
    assert_same(filtered(logits, min_p=p), by_transformers(logits, MinPLogitsWarper(p)))


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.3, 3), st.lists(st.integers(0, 49), min_size=1, max_size=30))
def test_repetition_penalty(seed, penalty, history):
    logits = random_logits(seed)
    expected = by_transformers(logits, RepetitionPenaltyLogitsProcessor(penalty), history=history)
    assert_same(filtered(logits, repetition_penalty=penalty, history=history), expected)


@settings(deadline=None, max_examples=60)
@given(
    seeds,
    st.floats(0.1, 3),
    st.integers(1, 40),
    st.floats(0.1, 0.99),
    st.floats(0.01, 0.3),
    st.floats(0.5, 2),
    st.lists(st.integers(0, 49), min_size=1, max_size=9),
)
def test_everything_together_in_transformers_order(seed, temperature, k, p, min_p, penalty, history):
    """``sample`` takes the largest of transformers' log-probabilities plus the noise of the position."""
    logits = random_logits(seed)
    expected = by_transformers(
        logits,
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(k),
        TopPLogitsWarper(p),
        MinPLogitsWarper(min_p),
        history=history,
    )
    options = {"temperature": temperature, "top_k": k, "top_p": p, "min_p": min_p, "repetition_penalty": penalty}
    assert_same(filtered(logits, history=history, **options), expected)
    noisy = expected + noise(50, seed % 7, position=11)
    assert sample(logits, 11, history, seed=seed % 7, **options) == int(noisy.argmax())


def test_greedy_takes_the_largest_whatever_the_filters():
    logits = random_logits(3)
    assert sample(logits, top_k=5, top_p=0.3) == int(logits.argmax())


def test_greedy_heeds_the_repetition_penalty():
    logits = torch.tensor([3.0, 2.0, -1.0])
    assert sample(logits, 1, [0], repetition_penalty=2.0) == 1


def test_a_position_has_its_own_noise_and_always_the_same():
    logits, options = torch.zeros(1000), {"temperature": 1.0, "seed": 4}
    draws = [sample(logits, position, **options) for position in range(50)]
    assert draws == module.sample(logits.expand(50, -1), [at(position, **options) for position in range(50)])
    assert len(set(draws)) > 40
    assert draws != [sample(logits, position, temperature=1.0, seed=5) for position in range(50)]


def test_noise_leaves_the_callers_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample(torch.zeros(9), temperature=1.0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 6, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_have_the_distribution(options):
    logits = random_logits(1, size=10) / 3
    expected = filtered(logits, **options).exp()
    places = [at(i // 100, **options, seed=i % 100) for i in range(50_000)]
    draws = Counter(module.sample(logits.expand(len(places), -1), places))
    assert g_test([draws[token] for token in range(10)], expected.tolist()) > 1e-3


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"stop": ""},
        {"stop": ["end", ""]},
        {"temprature": 1.0},
        {"seed": 2**63},
        {"seed": 1.5},
        {"seed": -(2**63) - 1},
    ],
    ids=str,
)
def test_bad_options_are_refused(bad):
    with pytest.raises(SpringtideError):
        Sampling.of(**bad)


def test_one_stop_string_is_a_list_of_one_and_none_is_none():
    assert Sampling.of(stop="end").stop == ("end",)
    assert Sampling.of(stop=None).stop == Sampling.of(stop=[]).stop == ()


# Rows side by side


options_of_a_place = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.integers(0, 60),
        "top_p": st.floats(0.01, 1),
        "min_p": st.sampled_from([0.0, 0.01, 0.4]),
        "repetition_penalty": st.sampled_from([1.0, 1.7, 0.6]),
        "seed": int64s,
    },
)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.lists(options_of_a_place, min_size=1, max_size=6), seeds)
def test_a_place_has_its_token_whatever_is_beside_it(data, all_options, seed):
    """Filters and penalties of its own, and tokens of its own before it, some of them on a path in a tree."""
    logits = torch.stack([random_logits(seed + i).float() for i in range(len(all_options))])
    seen, path = (st.lists(st.integers(least, 49), max_size=9) for least in (-1, 0))
    places = [Place(Sampling(**options), Seen(data.draw(seen)), data.draw(path)) for options in all_options]
    together = module.sample(logits, places)
    assert together == [module.sample(row[None], [place])[0] for row, place in zip(logits, places, strict=True)]
    joined = [at(len(p.path) + p.seen.length, [*map(int, p.seen.ids(logits.device)), *p.path]) for p in places]
    joined = [Place(place.sampling, one.seen) for place, one in zip(places, joined, strict=True)]
    assert together == module.sample(logits, joined)


@settings(deadline=None, max_examples=60)
@given(st.lists(options_of_a_place, min_size=1, max_size=6), seeds)
def test_distributions_side_by_side_are_those_of_each(all_options, seed):
    logits = torch.stack([random_logits(seed + i) for i in range(len(all_options))])
    places = [at(3, [1, 5, 1], **{**options, "temperature": 0.7}) for options in all_options]
    assert_same(
        distribution(logits, places),
        torch.cat([distribution(row[None], [place]) for row, place in zip(logits, places, strict=True)]),
    )


def test_top_p_of_a_flat_distribution_looks_beyond_the_few(monkeypatch):
    logits = random_logits(0, size=500) / 100
    expected = by_transformers(logits, TopPLogitsWarper(0.9))
    monkeypatch.setattr(module, "FEW", 2)
    assert_same(filtered(logits, top_p=0.9), expected)
    assert expected.isfinite().sum() > 400
    with_k = by_transformers(logits, TopKLogitsWarper(300), TopPLogitsWarper(0.9))
    assert_same(filtered(logits, top_p=0.9, top_k=300), with_k)


def test_what_greedy_decoding_sees_is_filtered_as_if_undivided():
    logits = random_logits(2)
    options = {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3, "history": [1, 2, 3]}
    greedy, one = (module.processed(logits[None], [at(**options, temperature=t)]) for t in (0.0, 1.0))
    assert torch.equal(greedy, one) and 0 < greedy.isinf().sum() < 50


def test_equally_probable_tokens_stay_together():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"top_k": 2, "top_p": 0.6}, {"top_k": 3, "top_p": 0.99}):
        assert filtered(logits, **options).isfinite().tolist() == [False, True, True, True, True, False]


# What was seen


@given(st.lists(st.lists(st.integers(-1, 20), max_size=6)))
def test_seen_tokens_are_kept_as_they_come(pieces):
    seen, tokens = Seen(), []
    for piece in pieces:
        seen.add(piece)
        tokens += piece
        ids = seen.ids(torch.device("cpu")).tolist()
        assert sorted(ids) == sorted({token for token in tokens if token >= 0})
        assert seen.length == len(tokens) and all((token in seen) == (token in ids) for token in range(21))


def test_rows_that_are_no_tokens_are_not_penalised():
    logits = torch.tensor([3.0, 2.0, 2.5])
    assert sample(logits, 3, [-1, -1, 2], repetition_penalty=2.0) == 0


# Noise

SEEDS = (0, 1, -1, -2, 2, 7, 12345, 2**31, 2**63 - 1, -(2**63))


def splitmix(state):
    """The published generator, in whole numbers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(int64s, st.integers(0, 2**40), st.integers(0, 2**20))
def test_noise_is_a_hash_of_seed_position_and_token(seed, position, token):
    golden = 0x9E3779B97F4A7C15
    key = splitmix(splitmix(seed + golden) + position * golden)
    uniform = ((splitmix(key + (token + 1) * golden) >> 12) + 0.5) / 2**52
    keys = noise_keys([Place(Sampling(seed=seed), Seen())], torch.device("cpu"))
    assert int(keys[0]) % 2**64 == splitmix(splitmix(seed + golden))
    key = key - 2**64 if key >= 2**63 else key
    expected = -torch.tensor(uniform, dtype=torch.float64).log()
    torch.testing.assert_close(gumbel(torch.tensor(key), torch.tensor(token)), -expected.log())


def test_noise_is_finite_at_its_ends(monkeypatch):
    for bits in (0, -1):
        monkeypatch.setattr(module, "_mixed", lambda x, bits=bits: torch.full_like(x, bits))
        assert gumbel(torch.tensor(1), torch.arange(3)).isfinite().all()


def uniforms(seeds, positions, tokens):
    """``exp(-exp(-noise))``, which is uniform: ``[seeds, positions, tokens]``."""
    grid = [[noise(tokens, seed, position) for position in range(positions)] for seed in seeds]
    return (-(-torch.stack([torch.stack(rows) for rows in grid])).exp()).exp()


def even(cells, count):
    """The p-value of numbers of ``cells`` being evenly spread over ``count`` cells."""
    return g_test(torch.bincount(cells.flatten(), minlength=count).tolist(), [1 / count] * count)


def test_noise_is_uniform_and_independent_among_tokens_positions_and_seeds():
    u = uniforms(SEEDS, 40, 2000)
    assert even((u * 1000).long(), 1000) > 1e-3
    fine = (u * 2**30).long()
    assert even(fine & 255, 256) > 1e-3, "the lower bits too"
    parts = (u * 16).long()
    for axis in range(3):
        for step in (1, 2, 5):
            there, here = parts.narrow(axis, step, u.shape[axis] - step), parts.narrow(axis, 0, u.shape[axis] - step)
            assert even(here * 16 + there, 256) > 1e-3


def test_every_seed_has_noise_of_its_own():
    draws = uniforms(SEEDS, 3, 50)
    assert len({tuple(row.flatten().tolist()) for row in draws}) == len(SEEDS)
    assert len(draws.unique()) == draws.numel()


def test_the_largest_of_noise_is_any_of_many_tokens():
    """Tokens far apart in a large vocabulary, each with the chance it should have."""
    vocab, few = 150_000, torch.tensor([0, 1, 2, 777, 65_536, 149_999])
    logits = torch.full((vocab,), -torch.inf)
    logits[few] = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.1]).log()
    keys = noise_keys([at(i, seed=3) for i in range(20_000)], torch.device("cpu"))
    winners = (logits[few] + gumbel(keys[:, None], few)).argmax(-1)
    assert g_test(torch.bincount(winners, minlength=6).tolist(), logits[few].exp().tolist()) > 1e-3
