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
from springtide.rows.sampling import Sampling, filtered, sample
from statistic import g_test

seeds = st.integers(0, 2**31)


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
    assert_same(filtered(logits, Sampling(top_k=k)), by_transformers(logits, TopKLogitsWarper(k)))


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.01, 0.999))
def test_top_p(seed, p):
    logits = random_logits(seed)
    assert_same(filtered(logits, Sampling(top_p=p)), by_transformers(logits, TopPLogitsWarper(p)))


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.001, 1))
def test_min_p(seed, p):
    logits = random_logits(seed)
    assert_same(filtered(logits, Sampling(min_p=p)), by_transformers(logits, MinPLogitsWarper(p)))


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.3, 3), st.lists(st.integers(0, 49), min_size=1, max_size=30))
def test_repetition_penalty(seed, penalty, history):
    logits = random_logits(seed)
    expected = by_transformers(logits, RepetitionPenaltyLogitsProcessor(penalty), history=history)
    assert_same(module._penalised(logits, penalty, history).log_softmax(-1), expected)


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
    options = Sampling(
        temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty, seed=seed % 7
    )
    noisy = expected + module.gumbel(50, seed % 7, position=11)
    assert sample(logits, options, history, position=11) == int(noisy.argmax())


def test_greedy_takes_the_largest_whatever_the_filters():
    logits = random_logits(3)
    assert sample(logits, Sampling(top_k=5, top_p=0.3), [], 0) == int(logits.argmax())


def test_greedy_heeds_the_repetition_penalty():
    logits = torch.tensor([3.0, 2.0, -1.0])
    assert sample(logits, Sampling(repetition_penalty=2.0), [0], 1) == 1


def test_a_position_has_its_own_noise_and_always_the_same():
    logits, options = torch.zeros(1000), Sampling(temperature=1.0, seed=4)
    draws = [sample(logits, options, [], position) for position in range(50)]
    assert draws == [sample(logits, options, [], position) for position in range(50)]
    assert len(set(draws)) > 40
    assert draws != [sample(logits, Sampling(temperature=1.0, seed=5), [], position) for position in range(50)]


def test_noise_leaves_the_callers_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample(torch.zeros(9), Sampling(temperature=1.0), [], 0)
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
    expected = filtered(logits / options["temperature"], Sampling(**options)).exp()
    draws = Counter(sample(logits, Sampling(**options, seed=i % 100), [], i // 100) for i in range(20_000))
    assert g_test([draws[token] for token in range(10)], expected.tolist()) > 1e-3


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"stop": ""},
        {"stop": ["end", ""]},
        {"temprature": 1.0},
    ],
    ids=str,
)
def test_bad_options_are_refused(bad):
    with pytest.raises(SpringtideError):
        Sampling.of(**bad)


def test_one_stop_string_is_a_list_of_one():
    assert Sampling.of(stop="end").stop == ("end",)
