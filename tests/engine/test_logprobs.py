"""How probable the model found its tokens, and several samples of a prompt."""

from __future__ import annotations

import json

import pytest
import torch

from guesses import Guesses
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.rows.sampling import Sampling
from tiny import random_tokens, tiny

PROMPT = random_tokens(19)
MODEL = tiny("qwen3", torch.float64)
SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.5, "seed": 3},
    "typical": {"temperature": 0.8, "accept": "typical"},
}
every_sampling = pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS.keys())


def by_transformers(output):
    """The model's log-probabilities at every token of an output, ``[n, V]``."""
    tokens = torch.tensor([[*PROMPT, *output.token_ids]])
    with torch.inference_mode():
        return MODEL(tokens).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)


@every_sampling
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_logprobs_are_the_models_own(options, kind):
    """Before penalty, temperature and filters, drafted or not."""
    plain = Engine(MODEL).generate(PROMPT, max_tokens=24, **options)
    engine = Engine(
        MODEL, drafter=None if kind == "none" else Guesses([PROMPT + plain.token_ids], kind), adaptive=False
    )
    output = engine.generate(PROMPT, max_tokens=24, logprobs=5, **options)
    expected = by_transformers(output)
    assert plain.logprobs is None and [each.token_id for each in output.logprobs] == output.token_ids
    for each, own in zip(output.logprobs, expected, strict=True):
        assert each.logprob == pytest.approx(float(own[each.token_id]), abs=1e-9)
        assert list(each.top) == own.topk(5).indices.tolist()
        assert list(each.top.values()) == pytest.approx(own.topk(5).values.tolist(), abs=1e-9)
    if kind == "mixed":
        assert output.stats.accepted_tokens


def test_there_are_as_many_as_asked_for():
    engine = Engine(MODEL)
    assert [each.top for each in engine.generate(PROMPT, max_tokens=3, logprobs=0).logprobs] == [{}] * 3
    assert [len(each.top) for each in engine.generate(PROMPT, max_tokens=3, logprobs=10**6).logprobs] == [97] * 3
    with pytest.raises(SpringtideError, match="logprobs must be 0 or more"):
        engine.generate(PROMPT, logprobs=-1)


def test_logprobs_end_with_the_output():
    engine = Engine(MODEL)
    plain = engine.generate(PROMPT, max_tokens=24).token_ids
    engine.eos = frozenset([plain[5]])
    drafted = Engine(MODEL, drafter=Guesses([PROMPT + plain], "oracle"), adaptive=False)
    drafted.eos = engine.eos
    for under in (engine, drafted):
        output = under.generate(PROMPT, max_tokens=24, logprobs=2)
        assert len(output.logprobs) == len(output.token_ids) == plain.index(plain[5]) + 1


def test_logprobs_in_json():
    output = Engine(MODEL).generate(PROMPT, max_tokens=2, logprobs=2)
    content = json.loads(json.dumps(output.as_json()))
    assert [each["token_id"] for each in content["logprobs"]] == output.token_ids
    assert [top["token_id"] for top in content["logprobs"][0]["top"]] == list(output.logprobs[0].top)
    assert Engine(MODEL).generate(PROMPT, max_tokens=2).as_json()["logprobs"] is None


def test_samples_have_the_seeds_from_the_first_on():
    engine, other = Engine(MODEL), random_tokens(7, seed=1)
    options = {"temperature": 1.0, "max_tokens": 12}

    def alone(prompt, seed):
        return engine.generate(prompt, seed=seed, **options).token_ids

    samples = engine.generate(PROMPT, n=3, seed=5, **options)
    assert [output.token_ids for output in samples] == [alone(PROMPT, seed) for seed in (5, 6, 7)]
    both = engine.generate([PROMPT, other], n=2, **options)
    assert [[output.token_ids for output in own] for own in both] == [
        [alone(prompt, seed) for seed in (0, 1)] for prompt in (PROMPT, other)
    ]
    assert [output.token_ids for output in engine.generate(PROMPT, n=1, **options)] == [alone(PROMPT, 0)]
    assert engine.generate([], n=2) == []
    for n in (0, -1):
        with pytest.raises(SpringtideError, match=r"n is .* at least 1"):
            engine.generate(PROMPT, n=n)


def test_samples_of_a_sampling_that_is_given():
    engine, sampling = Engine(MODEL), Sampling(max_tokens=9, temperature=1.0, seed=4)
    samples = engine.generate(PROMPT, sampling=sampling, n=2)
    assert [output.token_ids for output in samples] == [
        engine.generate(PROMPT, max_tokens=9, temperature=1.0, seed=seed).token_ids for seed in (4, 5)
    ]
