"""Effects are derivatives of log-probabilities, and their squares predict divergence."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from springtide.attention.policy import Layer, Policy
from springtide.attention.tidal import Tidal
from springtide.engine.engine import Engine
from springtide.evaluation import effects
from springtide.evaluation.effects import Attention, Branches, Recording
from springtide.kernels import reference
from springtide.model.stack import Pass, Stack
from springtide.rows.cache import Cache
from springtide.rows.segment import PREFIX, Segment
from tiny import random_tokens, tiny

CONTEXT = random_tokens(24)
TEXTS = [(random_tokens(9, seed=1), 3), (random_tokens(5, seed=2), 1), (random_tokens(6, seed=3), 4)]
COUNTED = [3, 1, 4]
TIDAL = Tidal(budget=7, sinks=1, recent=2)
MODELS = ["qwen3", "llama", "gemma2", "gemma3_text", "cohere2", "granite", "phi3-global", "qwen2"]
STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}  # of a derivative; norms in the model are fp32, whatever it is
EPSILON = 0.02
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def stack_of(name: str = "qwen3", dtype: torch.dtype = torch.float64) -> Stack:
    """The same model in any dtype."""
    name, _, everywhere = name.partition("-")
    model = tiny(name, torch.float64, **({"sliding_window": None} if everywhere else {}))
    return Stack(model if dtype == torch.float64 else deepcopy(model).to(dtype))


def cached(stack: Stack) -> Cache:
    return Engine(stack.model).read(CONTEXT).cache


@dataclass
class Draws:
    """A recording, and the tokens that were drawn for it, ``[SAMPLES, counted]``."""

    stack: Stack
    cache: Cache
    rows: Branches
    recording: Recording
    tokens: Tensor

    @classmethod
    def of(cls, stack: Stack, tidal: Tidal = TIDAL, seed: int = 0) -> Draws:
        cache, rows, drawn = cached(stack), Branches.of(TEXTS), []
        multinomial = torch.multinomial

        def spy(probabilities, *args, **options):
            drawn.append(multinomial(probabilities.double(), *args, **options))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "multinomial", spy)
            recording = Recording.of(stack, cache, rows, tidal, torch.Generator().manual_seed(seed))
        return cls(stack, cache, rows, recording, torch.cat(drawn, 1).T)

    @property
    def effects(self) -> Tensor:
        """Without weights: ``[SAMPLES, text, selecting, reading, KV head]``."""
        return self.unweighted(self.recording.effects()[0])

    def unweighted(self, found: Tensor) -> Tensor:
        weights = torch.tensor([(0.5 / len(self.tokens) / len(TEXTS) / counted) ** 0.5 for counted in COUNTED])
        found = found.unflatten(0, (len(self.tokens), len(TEXTS)))
        return found / weights.view(-1, *[1] * (found.ndim - 2))

    def predictions(self, policy: Policy | Perturbed) -> Tensor:
        """Log-probabilities ``[counted, V]``."""
        change = policy if isinstance(policy, Perturbed) else Perturbed()
        segment = self.rows.segment(self.cache.fork(), Policy() if change is policy else policy, self.stack.device)
        step = PerturbedPass(self.stack, [segment], change)
        with torch.inference_mode():
            hidden = step.run(step.embed(), 0, self.stack.spec.num_layers)
        return self.stack.logits(hidden[self.rows.counted]).log_softmax(-1)

    def slope(self, policy: Perturbed) -> Tensor:
        """Of the drawn tokens' log-probability in the size of a perturbation, ``[SAMPLES, text]``."""
        slopes = sum(self.predictions(policy.by(at * EPSILON)) * share / EPSILON for at, share in STENCIL.items())
        slopes = slopes.expand(len(self.tokens), -1, -1).gather(2, self.tokens[..., None])
        return torch.stack([x.sum(1) for x in slopes[..., 0].split(COUNTED, 1)], 1)


@dataclass(frozen=True)
class Chooser(Policy):
    """Dense attention, but keeps what TidalDecode would select at each layer."""

    tidal: Tidal = TIDAL
    chosen: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def reads(self, layer: Layer, q: Tensor, segment: Segment) -> None:
        if layer.window is None:
            self.chosen[layer.index] = self.tidal.choose(layer, q, segment)


@dataclass(frozen=True)
class Perturbed:
    """Dense attention, and ``epsilon`` times what it changes to read ``slots [R, H_kv, B]`` alone, at some layers."""

    slots: dict[int, Tensor] = field(default_factory=dict, compare=False)
    epsilon: float = 0.0
    head: int | None = None
    """The KV head that reads them; None for all."""

    def by(self, epsilon: float) -> Perturbed:
        return Perturbed(self.slots, epsilon, self.head)


class PerturbedPass(Pass):
    """A pass of one segment in which some layers' attention is perturbed."""

    def __init__(self, stack: Stack, segments: list[Segment], change: Perturbed) -> None:
        super().__init__(stack, segments)
        self.change = change

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, change, (segment,) = super().attend(layer, q, k, v), self.change, self.segments
        if layer.index not in change.slots:
            return out
        keys, values = segment.cache.read(layer.index, 0, segment.length)
        slots, group = change.slots[layer.index], q.shape[1] // len(keys)
        read = torch.zeros(*slots.shape[:2], segment.length, dtype=torch.bool).scatter(2, slots, True)
        read &= segment.seen().mask[:, None]
        sparse = out.clone()
        for head in range(len(keys)) if change.head is None else [change.head]:
            own, kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
            sparse[:, own], _ = reference.attend(
                q[:, own], keys[kv], values[kv], layer.scale, read[:, head], layer.softcap
            )
        return out + change.epsilon * (sparse - out)


def selections(draws: Draws, tidal: Tidal = TIDAL) -> dict[int, Tensor]:
    chooser = Chooser(tidal)
    draws.predictions(chooser)
    return chooser.chosen


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(0, 6), st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 0.7, 30.0]),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_attention_has_the_gradients_of_the_reference(rows, before, kv_heads, group, softcap, masked, seed):
    """Those of keys and values for the slots of the rows themselves; what came before is a constant."""
    draws = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_()
        for shape in [(rows, kv_heads * group, 4), (kv_heads, before + rows, 4), (kv_heads, before + rows, 4)]
    )
    mask = torch.rand(rows, before + rows, generator=draws) < 0.5
    mask[torch.arange(rows), before + torch.arange(rows)] = True
    seen = mask if masked else None
    (expected, _), out = reference.attend(q, k, v, 0.6, seen, softcap), Attention.apply(q, k, v, seen, 0.6, softcap)
    assert_close(out, expected)
    towards = torch.randn(q.shape, generator=draws, dtype=torch.float64)
    truths = torch.autograd.grad(expected, (q, k, v), towards)
    found = torch.autograd.grad(out, (q, k, v), towards.transpose(1, 2).contiguous().transpose(1, 2))
    assert_close(found[0], truths[0])
    for own, truth in zip(found[1:], truths[1:], strict=True):
        assert_close(own[:, before:], truth[:, before:])
        assert not own[:, :before].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_fewer_bits_is_close(dtype):
    draws = torch.Generator().manual_seed(3)
    exact = [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in [(6, 4, 8), (2, 40, 8), (2, 40, 8)]]
    towards = torch.randn(6, 4, 8, generator=draws, dtype=torch.float64)
    found = []
    for wanted in (torch.float64, dtype):
        ins = [x.to(dtype).to(wanted).requires_grad_() for x in exact]
        out = Attention.apply(*ins, None, 0.35, None)
        assert out.dtype == wanted
        found.append([out, *torch.autograd.grad(out, ins, towards.to(dtype).to(wanted))])
    for truth, own in zip(*found, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert_close(own.double(), truth, rtol=tolerance, atol=tolerance * float(truth.detach().abs().max()))


@pytest.mark.parametrize("heads", ["kv", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_an_effect_is_a_derivative(name, heads):
    """Of what a text's drawn tokens lose, for every pair of layers and every KV head; none where nothing is read."""
    tidal = Tidal(budget=7, sinks=1, recent=2, heads=heads)
    draws = Draws.of(stack_of(name), tidal)
    chosen = selections(draws, tidal)
    layers = list(draws.stack.spec.global_layers)
    assert draws.recording.layers == layers and len(layers) >= 2
    found = draws.effects
    assert found.shape == (effects.SAMPLES, len(TEXTS), len(layers), len(layers), 2)
    for i, selecting in enumerate(layers):
        for j, reading in enumerate(layers):
            if i >= j:
                assert (found[:, :, i, j] == 0).all()
                continue
            for head in range(2):
                expected = draws.slope(Perturbed({reading: chosen[selecting]}, head=head)).float()
                torch.testing.assert_close(found[:, :, i, j, head], expected, **CLOSE)
                assert expected.abs().mean() > 0.01


def test_texts_that_begin_alike_may_share_rows():
    """Up to what is predicted, and predictions are the same."""
    texts = [([5, 6, 7, 8], 2), ([5, 6, 9, 4, 3], 2), ([5, 6, 7, 8], 3), ([7, 6, 1], 1), ([5, 6, 7, 1, 1], 1)]
    apart, joined = Branches.of(texts), Branches.of(texts, joined=True)
    assert apart.tokens == [5, 6, 7, 5, 6, 9, 4, 5, 6, 7, 7, 6, 5, 6, 7, 1]
    assert joined.tokens == [5, 6, 7, 9, 4, 5, 6, 7, 7, 6, 1]
    assert joined.parents == [-1, 0, 1, 1, 3, -1, 5, 6, -1, 8, 7]
    assert [joined.tokens[row] for row in joined.counted] == [apart.tokens[row] for row in apart.counted]
    assert torch.equal(joined.answers, apart.answers)
    assert torch.equal(joined.chain[joined.counted], apart.chain[apart.counted])
    stack, predicted = stack_of(), []
    for rows in (apart, joined):
        segment = rows.segment(cached(stack), Policy(), stack.device)
        predicted.append(stack.logits(stack.forward([segment])[0][rows.counted]).log_softmax(-1))
        torch.testing.assert_close(rows.chances(predicted[-1]), rows.chances(predicted[0]))
    torch.testing.assert_close(*predicted)


@pytest.mark.parametrize("name", MODELS)
def test_a_gain_is_the_derivative_of_a_texts_probability(name, monkeypatch):
    """At the temperature at which answers are drawn; a hot one here, for models to which nothing is probable."""
    monkeypatch.setattr(effects, "TEMPERATURE", 4.0)
    draws = Draws.of(stack_of(name))
    chosen, layers = selections(draws), list(draws.stack.spec.global_layers)
    _, found = draws.recording.effects()
    assert found.shape == (len(TEXTS), len(layers), len(layers), 2) and found.dtype == torch.float32

    def slope(policy: Perturbed) -> Tensor:
        return sum(chances(draws.predictions(policy.by(at * EPSILON))) * by / EPSILON for at, by in STENCIL.items())

    def chances(predictions: Tensor) -> Tensor:
        """By hand."""
        hot = (predictions / 4).softmax(-1)
        right = hot[range(len(hot)), draws.rows.answers]
        return torch.stack([own.prod() for own in right.split(COUNTED)])

    truth = draws.predictions(Policy())
    torch.testing.assert_close(draws.rows.chances(truth).double(), chances(truth), rtol=1e-5, atol=0)
    for i, selecting in enumerate(layers):
        for j, reading in enumerate(layers):
            for head in range(2):
                if i >= j:
                    assert (found[:, i, j] == 0).all()
                    continue
                expected = slope(Perturbed({reading: chosen[selecting]}, head=head))
                scale = float(chances(truth).max())
                torch.testing.assert_close(found[:, i, j, head].double(), expected, rtol=1e-3, atol=1e-4 * scale)


def test_by_set_is_a_derivative_too():
    """Of one head's reading what any head of the selecting layer chose."""
    tidal = Tidal(budget=7, sinks=1, recent=2, heads="kv")
    draws = Draws.of(stack_of(), tidal)
    chosen = selections(draws, tidal)
    for selecting, reading in ((0, 2), (1, 3), (2, 3)):
        found = draws.unweighted(draws.recording.by_set(selecting, reading))
        assert found.shape == (effects.SAMPLES, len(TEXTS), 2, 2)
        for source in range(2):
            for head in range(2):
                slots = chosen[selecting][:, [source, source]]
                expected = draws.slope(Perturbed({reading: slots}, head=head)).float()
                torch.testing.assert_close(found[:, :, source, head], expected, **CLOSE)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_each_head_with_its_own_set_is_as_by_head(name):
    draws = Draws.of(stack_of(name), Tidal(budget=7, heads="kv"))
    layers, found = draws.recording.layers, draws.recording.effects()[0]
    for i, selecting in enumerate(layers):
        for j, reading in enumerate(layers[i + 1 :], i + 1):
            by_set = draws.recording.by_set(selecting, reading)
            torch.testing.assert_close(by_set.diagonal(dim1=1, dim2=2), found[:, i, j])
            assert not torch.allclose(by_set[:, 0], by_set[:, 1])


LAYOUTS = [[(0, 1), (0, 2), (0, 3)], [(1, 2), (1, 3)], [(0, 1), (2, 3)], [(0, 3)]]


@pytest.mark.parametrize("pairs", LAYOUTS, ids=str)
def test_squares_predict_the_divergence_of_small_perturbations(pairs, monkeypatch):
    """Mean over texts of the mean over their tokens, in nats, within what few samples allow."""
    monkeypatch.setattr(effects, "SAMPLES", 400)
    draws = Draws.of(stack_of())
    chosen = selections(draws)
    policy = Perturbed({reading: chosen[selecting] for selecting, reading in pairs}).by(1e-3)
    truth, own = draws.predictions(Policy()), draws.predictions(policy)
    divergence = (truth.exp() * (truth - own)).sum(-1)
    measured = torch.stack([x.mean() for x in divergence.split(COUNTED)]).mean() / 1e-6
    selecting, reading = (list(layers) for layers in zip(*pairs, strict=True))
    predicted = float(draws.recording.effects()[0].sum(-1)[:, selecting, reading].sum(1).square().sum())
    assert predicted == pytest.approx(float(measured), rel=0.15)


def test_a_budget_of_everything_has_no_effect():
    draws = Draws.of(stack_of(), Tidal(budget=100))
    assert draws.effects.abs().max() < 1e-5
    for dtype in (torch.float32, torch.bfloat16):
        covering, small = (Draws.of(stack_of(dtype=dtype), Tidal(budget=budget)).effects for budget in (100, 7))
        assert covering.abs().mean() < 0.02 * small.abs().mean()


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "qwen2"])
def test_in_lower_precision(name):
    exact = Draws.of(stack_of(name))
    single = Draws.of(stack_of(name, torch.float32))
    assert torch.equal(single.tokens, exact.tokens)
    torch.testing.assert_close(single.effects, exact.effects, rtol=1e-2, atol=1e-3)
    half = Draws.of(stack_of(name, torch.bfloat16)).recording.effects()[0]
    assert half.dtype == torch.float32 and half.shape == exact.recording.effects()[0].shape
    assert half.isfinite().all() and half.abs().sum() > 0


def test_the_cache_and_the_model_stay_as_they_are():
    stack = stack_of()
    cache = cached(stack)
    before = [[x.clone() for x in cache.read(layer, 0, len(CONTEXT))] for layer in range(4)]
    for _ in range(2):
        recording = Recording.of(stack, cache, Branches.of(TEXTS), TIDAL, torch.Generator().manual_seed(0))
        recording.effects(), recording.by_set(0, 2)
    assert cache.length == len(CONTEXT)
    for layer, kept in enumerate(before):
        assert all(torch.equal(a, b) for a, b in zip(cache.read(layer, 0, len(CONTEXT)), kept, strict=True))
    assert all(parameter.grad is None for parameter in stack.model.parameters())


def test_a_frozen_model_will_do():
    stack = stack_of()
    expected = Draws.of(stack).effects
    try:
        stack.model.requires_grad_(False)
        assert torch.equal(Draws.of(stack).effects, expected)
    finally:
        stack.model.requires_grad_(True)


def test_the_same_draws_for_the_same_seed():
    stack = stack_of()
    first, again, other = (Draws.of(stack, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.effects, again.effects) and not torch.equal(first.tokens, other.tokens)


def test_branches():
    """Two texts of 4 and 3 tokens: their last ones are no rows, and 2 and 1 of them are predicted."""
    rows = Branches.of([([10, 11, 12, 13], 2), ([20, 21, 22], 1)])
    assert rows.tokens == [10, 11, 12, 20, 21]
    assert rows.parents == [PREFIX, 0, 1, PREFIX, 3]
    assert rows.chain.tolist() == [0, 0, 0, 1, 1]
    assert rows.counted.tolist() == [1, 2, 4]
    assert rows.answers.tolist() == [12, 13, 22]
    whole = Branches.of([([5, 6, 7], 2)])
    assert (whole.counted.tolist(), whole.answers.tolist()) == ([0, 1], [6, 7])


def test_branches_are_predicted_as_each_alone():
    stack = stack_of()
    cache, rows = cached(stack), Branches.of(TEXTS)
    (together,) = stack.forward([rows.segment(cache.fork(), Policy(), stack.device)])
    for number, text in enumerate(TEXTS):
        alone = Branches.of([text])
        segment = alone.segment(cache.fork(), Policy(), stack.device)
        torch.testing.assert_close(together[rows.chain == number], stack.forward([segment])[0])
