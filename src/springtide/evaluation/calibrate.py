"""Chooses TidalDecode's layers for a model, says how much they change its predictions, and writes them down.

Three sets of prompts that share no fact and no question. On the first, gradients predict what every pair of a selecting
and a reading layer changes (:mod:`springtide.evaluation.effects`). Of the layout that is predicted to be best the
divergence from dense predictions is measured; every measurement corrects the predictions, and so on, for several
numbers of dense layers. Of the best few that were measured the second set chooses one. On the third its divergence is
measured again, and this is the figure that can be trusted.

Half of the prompts are contexts with facts and questions about them, of which only the numbers in the answers count:
nothing but the context tells them, so they show what a layout cannot find. The other half is plain text. A number
weighs as much as ``1 / TEXT_WEIGHT`` tokens of text.

A small divergence can still be one that makes right answers less probable wherever it is, so a layout is also charged
for the answers that it loses: by how much their probability falls below that under dense attention, if it does.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from springtide.attention.calibration import FILE, VERSION
from springtide.attention.layout import ROUNDING, Layout, Prediction, neighbours, search
from springtide.attention.policy import Policy, State
from springtide.attention.tidal import Tidal
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.evaluation.effects import Branches, Recording
from springtide.evaluation.needle import Haystack, check_fit
from springtide.evaluation.report import write_json
from springtide.files import replacing
from springtide.options import KVHead
from springtide.rows.cache import Cache

DEPTHS = tuple((i + 0.5) / 8 for i in range(8))  # of the facts in a context that is asked about
TEXT_ROWS = 64  # tokens at the end of a plain text that are decoded
TEXT_WEIGHT = 0.5  # of the mean over plain texts, beside the mean over questions
LOST_WEIGHT = 0.5  # nats a token that losing every answer is worth
PRICES = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # times that weight, at which good layouts are looked for
NEAREST = 40  # choices of other selecting layers that are looked at around a layout
TRIED = 3  # layouts that are measured at every place along the curve, at most
FINALISTS = 6  # layouts that are measured on other prompts too
SHARES = (1 / 10, 1 / 5, 1 / 3, 1 / 2)  # of layers that are dense, along the curve
BUDGETS = (0.5, 1, 2)  # times the budget, along the curve
PARTIAL = "springtide.partial"
TIMED = 5  # tokens whose median time is taken


@dataclass(frozen=True)
class Passage:
    """The ``texts`` that go on from a context, which ``cache`` holds; ``engine`` attends densely."""

    engine: Engine
    cache: Cache
    texts: list[tuple[list[int], int]]

    @cached_property
    def rows(self) -> Branches:
        """The texts, joined."""
        return Branches.of(self.texts, joined=True)

    @cached_property
    def dense(self) -> Tensor:
        """Dense predictions."""
        return predict(self.engine, self.cache, self.rows)

    @cached_property
    def chances(self) -> Tensor:
        """Those of the texts under dense attention."""
        return self.rows.chances(self.dense)


def predict(engine: Engine, cache: Cache, rows: Branches, state: State | None = None) -> Tensor:
    """Log-probabilities ``[counted, V]`` under the engine's policy; the cache's committed rows stay as they are.

    ``state`` is what the policy remembers of the sequence (default: nothing yet).
    """
    return engine.stack.peek(cache, engine.policy, rows.tokens, rows.parents, rows.counted, state).log_softmax(-1)


@dataclass(frozen=True)
class Measured:
    """Divergence from dense predictions, nats a token: of each question's number, and of each plain text.

    ``lost``: by how much less probable each right answer is than under dense attention, see
    :meth:`springtide.evaluation.effects.Branches.chances`. ``exact`` of the ``questions`` are answered rightly,
    ``dense_exact`` by dense attention.
    """

    questions: list[float]
    texts: list[float]
    lost: list[float]
    exact: int
    dense_exact: int

    def __add__(self, other: Measured) -> Measured:
        """On the prompts of both."""
        exact, dense_exact = self.exact + other.exact, self.dense_exact + other.dense_exact
        values = self.questions + other.questions, self.texts + other.texts, self.lost + other.lost
        return Measured(*values, exact, dense_exact)

    @property
    def loss(self) -> float:
        """What layouts are compared by."""
        divergence = statistics.fmean(self.questions) + TEXT_WEIGHT * statistics.fmean(self.texts)
        return divergence + LOST_WEIGHT * max(0.0, statistics.fmean(self.lost))


@dataclass(frozen=True)
class Point:
    """One place on the curve: a layout's cost and quality. ``kl_*``: nats a token."""

    dense_layers: int
    full: tuple[int, ...]
    select: tuple[int, ...]
    full_heads: tuple[KVHead, ...]
    budget: int
    kl_questions: float
    kl_text: float
    kv_bytes: int
    predicted_ms: float


@dataclass(frozen=True)
class Calibration:
    """The layout chosen, with ``dense`` layers' worth of dense KV heads; the divergences of the last few, best first;

    the trusted ones; the learnt map and the trusted divergences under it, if it was asked for; the curve.
    """

    dense: int
    layout: Layout
    tried: list[tuple[Layout, Measured]]
    fresh: Measured
    head_map: dict[int, list[int]] | None
    mapped: Measured | None
    curve: list[Point]
    cost: Cost
    budget: int
    length: int

    def as_json(self) -> dict[str, Any]:
        """The content of ``springtide.json``."""
        chosen = self.layout.as_json()
        if self.head_map is not None:
            chosen["map"] = {str(layer): sets for layer, sets in self.head_map.items()}
        return {
            "version": VERSION,
            "tidal": {**chosen, "budget": self.budget, "length": self.length, **self.trust()},
        }

    def said(self) -> str:
        """One sentence on how far to trust the layout."""
        x = self.trust()
        mapped = ""
        if self.mapped is not None:
            kls = statistics.fmean(self.mapped.questions), statistics.fmean(self.mapped.texts)
            mapped = f"With heads=map: {kls[0]:.4f} and {kls[1]:.4f}. "
        return (
            f"On fresh prompts, with {self.dense} layers' worth of dense KV heads and a budget of {self.budget} of "
            f"{self.length} tokens: answers diverge by {x['kl_questions']:.4f} ± "
            f"{x['kl_questions_se']:.4f} nats a token, text by {x['kl_text']:.4f} ± {x['kl_text_se']:.4f}; "
            f"the probability of right answers falls by {x['lost']:.3f} ± {x['lost_se']:.3f}; "
            f"{x['exact_match']:.0%} of {x['questions']} answers are right, {x['exact_match_dense']:.0%} under dense "
            f"attention. {mapped}" + self.cost.said(self.layout, self.budget)
        )

    def trust(self) -> dict[str, Any]:
        """On fresh prompts: divergences and answers lost, with standard errors; and right answers, dense beside."""
        found: dict[str, Any] = {}
        fresh = {"kl_questions": self.fresh.questions, "kl_text": self.fresh.texts, "lost": self.fresh.lost}
        for name, values in fresh.items():
            found[name] = round(statistics.fmean(values), 5)
            found[f"{name}_se"] = round(standard_error(values), 5)
        count = len(self.fresh.questions)
        return found | {
            "questions": count,
            "exact_match": round(self.fresh.exact / count, 4),
            "exact_match_dense": round(self.fresh.dense_exact / count, 4),
        }


@dataclass(frozen=True)
class Wish:
    """What calibration is asked for.

    Attributes:
        tidal: options of the policy, its budget among them; layers are what is looked for.
        length: context length in tokens.
        dense_layers: full and selecting layers together (None: a third, unless ``target_kl`` says).
        target_kl: take the fewest dense layers whose questions diverge by at most so many nats a token.
        prompts: contexts with questions in each of the three sets, and as many plain texts.
        trials: layouts that are measured for the number of dense layers that is taken.
        chat: questions are asked in the model's chat template.
        map: learn the map between KV heads that ``heads=map`` needs.
    """

    tidal: Tidal
    length: int = 2048
    dense_layers: int | None = None
    target_kl: float | None = None
    prompts: int = 3
    trials: int = 20
    chat: bool = False
    map: bool = False

    def check(self, engine: Engine) -> None:
        """Raise SpringtideError for what the model cannot do."""
        count = len(engine.stack.spec.global_layers)
        if count < 2:
            raise SpringtideError(
                f"The model has {count} layers without a sliding window, but 2 are needed; use the dense policy."
            )
        if self.dense_layers is not None and self.target_kl is not None:
            raise SpringtideError("Give either --dense-layers or --target-kl, not both.")
        if self.dense_layers is not None and not 1 <= self.dense_layers < count:
            raise SpringtideError(
                f"{self.dense_layers} dense layers were asked for, but the model has {count} layers without a sliding "
                f"window; choose 1 to {count - 1}."
            )
        if self.target_kl is not None and not self.target_kl > 0:
            raise SpringtideError(f"--target-kl is {self.target_kl}, but it must be above 0.")
        if not 1 <= self.tidal.budget_at(self.length) < self.length:
            raise SpringtideError(
                f"The budget is {self.tidal.named_budget}, but must be at least 1 and below the length, {self.length}."
            )
        if self.length <= TEXT_ROWS:
            raise SpringtideError(f"A length of {self.length} is too short to calibrate at; use more than {TEXT_ROWS}.")


@dataclass
class Partial:
    """What was measured so far, kept in a file so that an interrupted calibration goes on."""

    path: Path | None
    key: str
    effects: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    measured: dict[tuple[Any, ...], Measured] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path | None, key: str) -> Partial:
        """What the file holds of a calibration of the same model with the same options, if it does."""
        fresh = cls(path, key)
        if path is None or not path.is_file():
            return fresh
        try:
            found = torch.load(path, weights_only=True)
            if found["key"] != key:
                return fresh
            measured = {name: Measured(*values) for name, values in found["measured"].items()}
            return cls(path, key, found["effects"], measured)
        except Exception:  # the file may hold anything; it is measured again
            return fresh

    def save(self) -> None:
        """Keep everything, whole or not at all."""
        if self.path is not None:
            measured = {name: tuple(asdict(value).values()) for name, value in self.measured.items()}
            with replacing(self.path) as temporary:
                torch.save({"key": self.key, "effects": self.effects, "measured": measured}, temporary)


class Calibrator:
    """Measures effects and divergences of one model on prompts that are read when they are needed."""

    def __init__(self, engine: Engine, text: str, wish: Wish, partial: Path | None = None) -> None:
        wish.check(engine)
        self.engine, self.wish = engine.using(Policy()), wish
        self.haystack = Haystack(engine.tokenizer, text, seed=1, chat=wish.chat)
        self.layers = engine.stack.spec.global_layers
        self.budget = wish.tidal.budget_at(wish.length)
        self.tidal = replace(wish.tidal, budget=self.budget)
        model = (engine.stack.fingerprint, len(self.layers), engine.stack.model.dtype)
        read = hashlib.sha256(text.encode()).hexdigest()
        self.key = repr((*model, wish.length, wish.prompts, wish.chat, self.tidal, read))
        self.partial = Partial.at(partial, self.key)
        self._passages: dict[int, Passage] = {}
        if len(self.haystack.book) < wish.length:
            raise SpringtideError(
                f"The text has {len(self.haystack.book)} tokens, but the length is {wish.length}; "
                "give a longer text or a shorter length."
            )
        check_fit(engine, wish.length, wish.length + 1)
        self._questions(0)

    def prompts(self, which: int) -> range:
        """Numbers of the passages of a set: 0 to explore by, 1 to choose by, 2 to trust; half of them plain text."""
        count = 2 * self.wish.prompts
        return range(which * count, (which + 1) * count)

    def passage(self, number: int) -> Passage:
        """A passage: of even number questions, of odd number plain text. It is kept until another set's turn."""
        if number not in self._passages:
            context, texts = self._text(number // 2) if number % 2 else self._questions(number // 2)
            own = self.prompts(number // (2 * self.wish.prompts))
            self._passages = {other: kept for other, kept in self._passages.items() if other in own}
            self._passages[number] = Passage(self.engine, self.engine.read(context).cache, texts)
        return self._passages[number]

    def effects(self, number: int) -> tuple[Tensor, Tensor]:
        """What is predicted for a passage, of all pairs of layers.

        Divergence ``[selecting, reading, KV head]``, nats a token; and by how much more probable each of its texts
        becomes, ``[texts, selecting, reading, KV head]``.
        """
        if number not in self.partial.effects:
            effects, gains = self.recording(number).effects()
            self.partial.effects[number] = effects.double().square().sum(0), gains
            self.partial.save()
        return self.partial.effects[number]

    def recording(self, number: int, heads: Literal["all", "kv"] | None = None) -> Recording:
        """Gradients on a passage, and selections as the policy makes them, or for ``heads``."""
        draws = torch.Generator().manual_seed(number)
        tidal = self.tidal if heads is None else replace(self.tidal, heads=heads)
        passage = self.passage(number)
        return Recording.of(self.engine.stack, passage.cache, Branches.of(passage.texts), tidal, draws)

    def weight(self, number: int) -> float:
        """What effects on a passage are multiplied with, so that squares over a set add up to the loss."""
        return math.sqrt((TEXT_WEIGHT if number % 2 else 1) / self.wish.prompts)

    def measured(self, tidal: Tidal, which: int) -> Measured:
        """Divergences under ``tidal``, resolved, on a set of passages."""
        heads = tuple(map(tuple, tidal.full_heads or ()))
        name = (tidal.full, tidal.selecting, heads, tidal.budget, tidal.heads, which)
        if name not in self.partial.measured:
            kls: tuple[list[float], list[float]] = ([], [])
            lost: list[float] = []
            exact = dense_exact = 0
            under = self.engine.using(tidal)
            for number in self.prompts(which):
                passage = self.passage(number)
                rows = passage.rows
                found = predict(under, passage.cache, rows)
                kl = kl_div(found, passage.dense, log_target=True, reduction="none").sum(-1)
                if number % 2 == 0:
                    lost += (passage.chances - rows.chances(found)).tolist()
                chain = rows.chain[rows.counted]
                for text in range(int(chain.max()) + 1):
                    kls[number % 2].append(float(kl[chain == text].mean()))
                    if number % 2 == 0:
                        answers = rows.answers[chain == text]
                        exact += bool((found[chain == text].argmax(-1).cpu() == answers).all())
                        dense_exact += bool((passage.dense[chain == text].argmax(-1).cpu() == answers).all())
            self.partial.measured[name] = Measured(*kls, lost, exact, dense_exact)
            self.partial.save()
        return self.partial.measured[name]

    def policy(self, layout: Layout, head_map: dict[int, list[int]] | None = None, scale: float = 1) -> Tidal:
        """The policy of a layout, resolved, with so many times the budget."""
        budget = max(1, min(self.wish.length - 1, round(scale * self.budget)))
        tidal = replace(self.tidal, budget=budget, **layout.options)
        if head_map is not None:
            tidal = replace(tidal, heads="map", map=tuple((layer, tuple(sets)) for layer, sets in head_map.items()))
        return tidal.resolve(self.engine.stack.spec)

    def cost(self, layout: Layout) -> Cost:
        """Times a token after a context, all layers dense and with the layout, and draws a line through them."""
        passage = self.passage(self.prompts(2)[1])
        first = passage.cache.read(self.layers[0], 0, 1)
        token, kv_heads = sum(x.nbytes for x in first), len(first[0])
        windows = tuple(window for window in self.engine.stack.spec.windows if window is not None)
        untimed = Cost(len(self.layers), self.wish.length, token * self.wish.length, windows, kv_heads)
        rows = Branches.of([([passage.rows.tokens[0]] * 2, 1)])
        times: list[list[float]] = []
        for policy in (Policy(), self.policy(layout)):
            under, state = self.engine.using(policy), policy.new_state()  # made in the first pass, which does not count
            times.append([])
            for _ in range(TIMED):
                start = time.perf_counter()
                predict(under, passage.cache, rows, state).argmax(-1).tolist()
                times[-1].append(1e3 * (time.perf_counter() - start))
        dense, sparse = (statistics.median(own[1:]) for own in times)
        saved = len(self.layers) * untimed.layer_bytes - untimed.bytes_of(layout, self.budget)
        return replace(untimed, dense_ms=dense, ms_per_byte=max(0.0, dense - sparse) / saved if saved > 0 else 0.0)

    def _questions(self, number: int) -> tuple[list[int], list[tuple[list[int], int]]]:
        """A context with facts, and its questions with their answers, of which the numbers are to be predicted."""
        trial = self.haystack.trial(self.wish.length, number, DEPTHS)
        return trial.context, [
            (question.tokens + question.answer, len(question.answer)) for question in trial.questions
        ]

    def _text(self, number: int) -> tuple[list[int], list[tuple[list[int], int]]]:
        """A stretch of plain text, the end of which is to be predicted."""
        book, length = self.haystack.book, self.wish.length
        start = round(number * (len(book) - length) / (3 * self.wish.prompts - 1))
        window = self.engine.encode("") + book[start : start + length]
        end = len(window) - TEXT_ROWS
        return window[:end], [(window[end:], TEXT_ROWS - 1)]


def calibrate(engine: Engine, text: str, wish: Wish, partial: Path | None = None) -> Iterator[Calibration | None]:
    """Choose full and selecting layers, see the module; ``partial`` is a file to go on from, the caller's to remove.

    Yields None after every step, for progress, and the result last. Raises SpringtideError, before any work, for a text
    too short or for what the model does not have.
    """
    calibrator = Calibrator(engine, text, wish, partial)
    layers = calibrator.layers
    for number in calibrator.prompts(0):
        calibrator.effects(number)
        yield None
    explorers = {dense: Explorer(calibrator, dense) for dense in ladder(len(layers), wish.dense_layers)}
    for explorer in explorers.values():
        for _ in range(min(TRIED, wish.trials)):
            explorer.step()
            yield None
    dense = _number(wish, explorers, len(layers))
    tried = explorers[dense].tried
    for _ in range(wish.trials - TRIED):
        explorers[dense].step()
        yield None
    finals: dict[Layout, Measured] = {}
    for layout in sorted(tried, key=lambda layout: tried[layout].loss)[:FINALISTS]:
        finals[layout] = tried[layout] + calibrator.measured(calibrator.policy(layout), 1)
        yield None
    layout = _best(finals)
    head_map = None
    if wish.map:
        learner = MapLearner(layout, layers)
        for number in calibrator.prompts(0):
            learner.add(calibrator.recording(number, "kv"), calibrator.weight(number))
            yield None
        head_map = learner.learn()
    fresh = calibrator.measured(calibrator.policy(layout), 2)
    mapped = None if head_map is None else calibrator.measured(calibrator.policy(layout, head_map), 2)
    yield None
    curve = []
    cost = calibrator.cost(layout)
    for number, explorer in explorers.items():
        chosen = layout if number == dense else explorer.best
        for scale in BUDGETS:
            policy = calibrator.policy(chosen, scale=scale)
            curve.append(_point(number, chosen, policy.budget_at(wish.length), calibrator.measured(policy, 2), cost))
            yield None
    ranked = sorted(finals.items(), key=lambda pair: pair[1].loss)
    yield Calibration(dense, layout, ranked, fresh, head_map, mapped, curve, cost, calibrator.budget, wish.length)


def brief(engine: Engine, text: str, wish: Wish) -> Iterator[dict[str, Any] | None]:
    """Layers by the gradients of ``wish.prompts`` prompts alone, none of them tried: the content of the file.

    Yields None after every passage, of which there are two a prompt, for progress, and the result last.
    """
    calibrator = Calibrator(engine, text, wish)
    for number in calibrator.prompts(0):
        calibrator.effects(number)
        yield None
    near = Explorer(calibrator, a_third(len(calibrator.layers))).near()
    layout = min(near, key=lambda layout: layout.loss)
    yield {"version": VERSION, "tidal": {**layout.as_json(), "budget": calibrator.budget, "length": wish.length}}


class Explorer:
    """Measures layouts with ``dense`` layers' worth of dense KV heads, and learns from it which may be better.

    ``tried``: what was measured.
    """

    def __init__(self, calibrator: Calibrator, dense: int) -> None:
        self.calibrator, self.dense = calibrator, dense
        self.tried: dict[Layout, Measured] = {}
        losses, gains = zip(*(calibrator.effects(number) for number in calibrator.prompts(0)), strict=True)
        self._questions, self._texts, self._gains = (
            Prediction(torch.stack(own).mean(0), calibrator.layers)
            for own in (losses[::2], losses[1::2], [one.double().mean(0) for one in gains[::2]])
        )

    @property
    def best(self) -> Layout:
        """Of those that were measured."""
        return _best(self.tried)

    def step(self) -> None:
        """Measure one layout more, if there is one close to the best.

        Every other one has selecting layers that were not tried, if there are any.
        """
        untried = [layout for layout in self.near() if layout not in self.tried]
        selects = {layout.select for layout in self.tried}
        elsewhere = [layout for layout in untried if layout.select not in selects] if len(self.tried) % 2 else []
        if untried:
            layout = min(elsewhere or untried, key=lambda layout: layout.loss)
            self.tried[layout] = self.calibrator.measured(self.calibrator.policy(layout), 0)

    def near(self) -> list[Layout]:
        """Layouts that may be good, with the loss that is predicted.

        Those around the best one, and around the ones that are predicted to be best. Answers that are won count for
        nothing, so that losses do not add up; where an answer has a price, lost or won, they do.
        """
        divergence, answers = self.predictions()
        found = set()
        for price in PRICES:
            prediction = replace(divergence, losses=divergence.losses + LOST_WEIGHT * price * answers.losses)
            for centre in [search(prediction, self.dense), *([self.best] if self.tried else [])]:
                found.add(centre)
                found.update(neighbours(centre, prediction, self.dense, NEAREST))
                found.update(prediction.exchanges(centre))

        def loss(layout: Layout) -> float:
            lost = float(answers.lost(layout).sum())
            return float(divergence.lost(layout).sum()) + LOST_WEIGHT * max(0.0, lost)

        return [replace(layout, loss=loss(layout)) for layout in found]

    def predictions(self) -> tuple[Prediction, Prediction]:
        """Of divergence as it is weighed, and of answers that are lost, corrected by all that were measured.

        Answers are fewer by the gains, and by more the larger the divergence is, which is learnt.
        """
        kls = {layout: statistics.fmean(measured.questions) for layout, measured in self.tried.items()}
        questions = self._questions.corrected(kls)
        texts = self._texts.corrected({x: statistics.fmean(y.texts) for x, y in self.tried.items()})
        divergence = replace(questions, losses=questions.losses + TEXT_WEIGHT * texts.losses)
        lost = -self._gains.losses
        if self.tried and self._questions.losses.any():
            gained = {layout: float(self._gains.lost(layout).sum()) for layout in self.tried}
            beyond = {x: statistics.fmean(y.lost) + gained[x] for x, y in self.tried.items()}
            scale = {layout: max(ROUNDING, kl) for layout, kl in kls.items()}
            lost = self._questions.losses * self._questions.factors(beyond, scale) + lost
        return divergence, replace(divergence, losses=lost)


def a_third(layers: int) -> int:
    """How many of the layers are dense where nothing else is said."""
    return max(1, round(layers / 3))


def ladder(layers: int, wanted: int | None) -> list[int]:
    """Numbers of dense layers along the curve, ``wanted`` or the default among them."""
    numbers = {max(1, round(share * layers)) for share in SHARES} | {wanted or a_third(layers)}
    return sorted(number for number in numbers if number < layers)


def steps(engine: Engine, wish: Wish) -> int:
    """How many steps :func:`calibrate` takes at most."""
    points = len(ladder(len(engine.stack.spec.global_layers), wish.dense_layers))
    prompts = (4 if wish.map else 2) * wish.prompts
    return prompts + points * (TRIED + len(BUDGETS)) + max(0, wish.trials - TRIED) + FINALISTS + 1


def _number(wish: Wish, explorers: dict[int, Explorer], layers: int) -> int:
    """The number of dense layers to take."""
    if wish.target_kl is None:
        return wish.dense_layers or a_third(layers)
    for number, explorer in explorers.items():
        kl = statistics.fmean(explorer.tried[explorer.best].questions)
        if kl <= wish.target_kl:
            return number
    warnings.warn(f"no layout meets --target-kl {wish.target_kl}: {number} dense layers reach {kl:.4f}", stacklevel=2)
    return number


def _best(found: dict[Layout, Measured]) -> Layout:
    return min(found, key=lambda layout: found[layout].loss)


class MapLearner:
    """Learns which set of the last selecting layer each KV head of a sparse layer reads to lose least."""

    def __init__(self, layout: Layout, layers: Sequence[int]) -> None:
        dense = {*layout.full, *layout.select}
        sparse = [layer for layer in layers if layer not in dense]
        self.dense = layout.full_heads
        self.pairs = [(max(s for s in layout.select if s < layer), layer) for layer in sparse]
        self.parts: list[list[Tensor]] = [[] for _ in self.pairs]

    def add(self, recording: Recording, weight: float) -> None:
        """Take in the effects on a passage; heads that are dense have none."""
        for part, pair in zip(self.parts, self.pairs, strict=True):
            effects = recording.by_set(*pair) * weight
            effects[:, :, [head for layer, head in self.dense if layer == pair[1]]] = 0
            part.append(effects)

    def learn(self) -> dict[int, list[int]]:
        """``{sparse layer: a KV head of the selecting layer for each of its own}``: one head after the other, twice."""
        effects = [torch.cat(part) for part in self.parts]  # [N, set, head] of each pair
        heads = range(effects[0].shape[2])
        found = [list(heads) for _ in effects]
        total = sum((own[:, head, head] for own in effects for head in heads), torch.zeros(len(effects[0])))
        for _ in range(2):
            for own, chosen in zip(effects, found, strict=True):
                for head in heads:
                    rest = total - own[:, chosen[head], head]
                    loss = (rest[:, None] + own[:, :, head]).square().sum(0) + own[:, :, head].square().sum(0)
                    chosen[head] = int(loss.argmin())
                    total = rest + own[:, chosen[head], head]
        return {layer: chosen for (_, layer), chosen in zip(self.pairs, found, strict=True)}


@dataclass(frozen=True)
class Cost:
    """What decoding a token costs at the calibrated length.

    A layer that sees everything has ``layer_bytes`` of keys and values of ``kv_heads`` there, and there are ``layers``
    of them; the others see ``windows`` tokens. ``dense_ms`` were measured with all layers dense, and a byte less takes
    ``ms_per_byte`` less.
    """

    layers: int
    length: int
    layer_bytes: int
    windows: tuple[int, ...]
    kv_heads: int
    dense_ms: float = 0.0
    ms_per_byte: float = 0.0

    def said(self, layout: Layout, budget: int) -> str:
        """One sentence on what a layout saves."""
        sliding = sum(self.layer_bytes * min(window, self.length) / self.length for window in self.windows)
        read, dense = (x + sliding for x in (self.bytes_of(layout, budget), self.layers * self.layer_bytes))
        start = "A"
        if self.windows:
            start = (
                f"{len(self.windows)} of the {self.layers + len(self.windows)} layers see {max(self.windows)} tokens "
                "at most and take no part, so little is gained unless the context is much longer than that: a"
            )
        return f"{start} token reads {read / 1e6:.2f} MB of the cache instead of {dense / 1e6:.2f} MB."

    def bytes_of(self, layout: Layout, budget: int) -> int:
        """Of the cache: dense layers and KV heads, selecting layers' keys once more, and what is selected."""
        dense = len(layout.full) + len(layout.select)
        whole = dense + len(layout.select) / 2 + len(layout.full_heads) / self.kv_heads
        return round(self.layer_bytes * (whole + (self.layers - dense) * budget / self.length))

    def ms_of(self, layout: Layout, budget: int) -> float:
        """Predicted milliseconds a token."""
        return self.dense_ms - self.ms_per_byte * (self.layers * self.layer_bytes - self.bytes_of(layout, budget))


def _point(dense: int, layout: Layout, budget: int, found: Measured, cost: Cost) -> Point:
    kls = statistics.fmean(found.questions), statistics.fmean(found.texts)
    bytes_read, ms = cost.bytes_of(layout, budget), cost.ms_of(layout, budget)
    return Point(dense, layout.full, layout.select, layout.full_heads, budget, *kls, bytes_read, ms)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def write(calibration: dict[str, Any], folder: Path) -> Path:
    """Write ``springtide.json`` into a model folder, whole or not at all."""
    path = folder / FILE
    write_json(path, calibration)
    return path
