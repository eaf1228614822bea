"""Calibration finds a layout that the model can use, says how far to trust it, or says why it cannot."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide import SpringtideError
from springtide.attention import Tidal
from springtide.attention.calibration import VERSION, read_calibration
from springtide.attention.layout import Layout, Prediction, search
from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.evaluation import calibrate as calibration
from springtide.evaluation.calibrate import (
    BUDGETS,
    DEPTHS,
    LOST_WEIGHT,
    TEXT_ROWS,
    TEXT_WEIGHT,
    Calibration,
    Calibrator,
    Cost,
    Explorer,
    MapLearner,
    Measured,
    Wish,
    brief,
    calibrate,
    ladder,
    standard_error,
    steps,
    write,
)
from springtide.evaluation.effects import Recording
from springtide.evaluation.needle import Haystack
from springtide.options import KVHead, Share
from springtide.rows.segment import Segment
from tiny import tiny

WISH = Wish(Tidal(budget=32), length=400, prompts=1, trials=3)


def engine(name: str = "qwen3", **overrides) -> Engine:
    model = tiny(name, vocab_size=VOCAB, max_position_embeddings=1024, **overrides)
    return springtide.load(model, tokenizer())


def calibrated(engine: Engine, text: str = BOOK, partial: Path | None = None, **options) -> Calibration:
    wish = replace(WISH, **options)
    *before, result = calibrate(engine, text, wish, partial)
    assert set(before) == {None}
    assert len(before) <= steps(engine, wish)
    return result


def deep() -> Engine:
    return engine(num_hidden_layers=6)


@cache
def found() -> Calibration:
    """Of six layers, with more layouts than gradients alone would try."""
    return calibrated(deep(), trials=9, map=True)


def worth(chosen) -> float:
    """How many layers' worth of KV heads are dense, of a layout or a point on the curve of models with two of them."""
    return len(chosen.full) + len(chosen.select) + len(chosen.full_heads) / 2


def timeless(result: Calibration) -> Calibration:
    """Without what a clock measured."""
    cost = replace(result.cost, dense_ms=0.0, ms_per_byte=0.0)
    return replace(result, cost=cost, curve=[replace(point, predicted_ms=0.0) for point in result.curve])


# What is chosen


def test_the_layout_is_the_best_one_measured():
    losses = [measured.loss for _, measured in found().tried]
    assert found().layout == found().tried[0][0] and losses == sorted(losses)
    layouts = [layout for layout, _ in found().tried]
    assert 2 <= len(layouts) == len(set(layouts)) <= 9
    assert {worth(layout) for layout in layouts} == {2}
    loss = statistics.fmean(found().tried[0][1].questions) + TEXT_WEIGHT * statistics.fmean(found().tried[0][1].texts)
    assert losses[0] == loss


@pytest.mark.parametrize("seed", range(3))
def test_measurements_decide_whatever_was_predicted(seed, monkeypatch):
    """Layouts' losses are made up: the best of those that are met is taken, for every number of dense layers."""
    met: dict[float, dict[Layout, float]] = {}

    def measured(self: Calibrator, tidal: Tidal, which: int) -> Measured:
        layout = Layout(tidal.full, tidal.selecting, tidal.full_heads)
        loss = 0.01 + random.Random(f"{seed} {layout}").random()
        if which == 0 and tidal.budget == 32:
            met.setdefault(worth(layout), {})[layout] = loss
        return Measured([loss], [0.0], [0.0], 0, 0)

    monkeypatch.setattr(Calibrator, "measured", measured)
    result = calibrated(deep(), trials=9)
    assert 2 <= len(met[2]) <= 9
    assert result.layout == min(met[2], key=lambda layout: met[2][layout])
    for point in result.curve:
        own = met[point.dense_layers]
        assert Layout(point.full, point.select, point.full_heads) == min(own, key=lambda layout: own[layout])


class Planned:
    """Stands for a calibrator whose predictions and measurements are made up."""

    layers = range(3, 17, 2)
    wish = replace(WISH, prompts=2)

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.predicted = torch.rand(4, 7, 7, 2, generator=generator, dtype=torch.float64)
        self.truth = self.predicted * (0.5 + 2 * torch.rand(7, 1, 1, generator=generator, dtype=torch.float64))
        self.gains = 0.1 * torch.randn(7, 7, 2, generator=generator, dtype=torch.float64)
        self.met: list[Layout] = []

    def prompts(self, which: int) -> range:
        return range(4)

    def effects(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.predicted[number], self.gains.expand(3, *self.gains.shape)

    def policy(self, layout: Layout) -> Layout:
        return layout

    def parts(self, layout: Layout) -> list[float]:
        """Divergence of questions and of texts."""
        parts = (self.truth[::2].mean(0), self.truth[1::2].mean(0))
        return [float(Prediction(part, self.layers).lost(layout).sum()) for part in parts]

    def measured(self, layout: Layout, which: int) -> Measured:
        assert which == 0
        self.met.append(layout)
        questions, texts = self.parts(layout)
        lost = 0.3 * questions - float(Prediction(self.gains, self.layers).lost(layout).sum())
        return Measured([questions / 2, questions * 3 / 2], [texts], [lost - 0.1, lost + 0.1], 0, 0)

    def loss(self, layout: Layout) -> float:
        return self.measured(layout, 0).loss

    def best(self, dense: int) -> float:
        """The least loss of what searches with the truth find, at any price of answers."""
        questions, texts = self.truth[::2].mean(0), self.truth[1::2].mean(0)
        divergence, lost = questions + TEXT_WEIGHT * texts, 0.3 * questions - self.gains
        every = (Prediction(divergence + LOST_WEIGHT * price / 16 * lost, self.layers) for price in range(17))
        return min(self.loss(search(prediction, dense)) for prediction in every)


@pytest.mark.parametrize("seed", range(4))
def test_layouts_are_measured_once_and_every_other_one_selects_elsewhere(seed):
    planned = Planned(seed)
    for dense in (3, 4):
        explorer = Explorer(planned, dense)
        planned.met.clear()
        for _ in range(16):
            explorer.step()
        met = planned.met
        assert 3 < len(met) == len({*met}) <= 16 and [*explorer.tried] == met
        assert explorer.tried[explorer.best].loss == min(measured.loss for measured in explorer.tried.values())
        assert {worth(layout) for layout in met} == {dense}
        for place in range(1, min(6, len(met)), 2):
            assert met[place].select not in {layout.select for layout in met[:place]}


@pytest.mark.parametrize("seed", range(4))
def test_what_is_explored_learns_which_layers_select_badly(seed):
    """And that answers go with the divergence: few measurements find a better layout than predictions alone."""
    planned = Planned(seed)
    explorer = Explorer(planned, 3)
    for _ in range(16):
        explorer.step()
    losses = [planned.loss(layout) for layout in [*planned.met]]
    assert min(losses) <= losses[0]
    assert min(losses) <= 1.1 * planned.best(3)
    learnt = min(explorer.near(), key=lambda layout: layout.loss)
    assert planned.loss(learnt) <= 1.1 * planned.best(3)
    assert learnt.loss == pytest.approx(planned.loss(learnt), rel=0.05)


def test_layouts_are_judged_by_gradients_until_something_is_measured():
    """And answers that are predicted to be won count for nothing."""
    planned, signs = Planned(0), set()
    divergence = Prediction(
        planned.predicted[::2].mean(0) + TEXT_WEIGHT * planned.predicted[1::2].mean(0), range(3, 17, 2)
    )
    for layout in Explorer(planned, 3).near():
        lost = -float(replace(divergence, losses=planned.gains).lost(layout).sum())
        assert layout.loss == pytest.approx(float(divergence.lost(layout).sum()) + LOST_WEIGHT * max(0.0, lost))
        signs.add(lost > 0)
    assert signs == {True, False}


def test_a_step_that_finds_nothing_new_does_nothing():
    """Of two layers there is one layout with a dense one for each that selects first."""
    planned = Planned(0)
    planned.layers, planned.gains = range(2), planned.gains[:2, :2]
    planned.predicted, planned.truth = planned.predicted[:, :2, :2], planned.truth[:, :2, :2]
    explorer = Explorer(planned, 1)
    for _ in range(4):
        explorer.step()
    assert planned.met == [Layout((), (0,))]


@pytest.mark.parametrize("dense", [1, 3])
def test_the_number_of_dense_layers_may_be_given(dense):
    result = calibrated(engine(), dense_layers=dense)
    assert worth(result.layout) == result.dense == dense
    assert dense in {point.dense_layers for point in result.curve}


def test_a_target_takes_the_fewest_dense_layers_that_meet_it():
    """By the prompts that layouts are explored on."""
    shallow = engine()
    again, kl = Calibrator(shallow, BOOK, WISH), {}
    for point in calibrated(shallow, trials=1).curve:
        layout = Layout(point.full, point.select, point.full_heads)
        kl[point.dense_layers] = statistics.fmean(again.measured(again.policy(layout), 0).questions)
    assert set(kl) == {1, 2} and kl[2] < kl[1]
    for target, dense in ((kl[1], 1), (kl[1] * 0.999, 2), (kl[2] * 0.999, 2)):
        assert worth(calibrated(shallow, trials=1, target_kl=target).layout) == dense


def test_the_curve_has_every_number_of_layers_and_every_budget():
    numbers = ladder(6, None)
    assert numbers == [1, 2, 3] and ladder(6, 5) == [1, 2, 3, 5] and max(ladder(36, None)) == 18
    curve = found().curve
    assert [(point.dense_layers, point.budget) for point in curve] == list(product(numbers, (16, 32, 64)))
    assert len(BUDGETS) == 3
    again = Calibrator(deep(), BOOK, WISH)
    for point in curve:
        assert worth(point) == point.dense_layers
        layout = Layout(point.full, point.select, point.full_heads)
        if point.dense_layers == 2:
            assert layout == found().layout
        measured = again.measured(again.policy(layout, scale=point.budget / 32), 2)
        assert point.kl_questions == pytest.approx(statistics.fmean(measured.questions), rel=1e-4)
        assert point.kl_text == pytest.approx(statistics.fmean(measured.texts), rel=1e-4)
        assert point.predicted_ms > 0


def test_bytes_are_those_that_a_token_at_that_length_reads():
    one = deep()
    cache = one.read(one.encode(BOOK)[:399]).cache
    for point in found().curve:
        tidal = Tidal(budget=point.budget, **Layout(point.full, point.select, point.full_heads).options)
        segment = Segment.chain(cache.fork(), 399, [5], "decode", one.resolve(tidal), state=Tidal().new_state())
        one.stack.forward([segment])
        assert point.kv_bytes == segment.bytes_read


@pytest.mark.parametrize("budget", [16, 200, 300])
def test_a_layout_may_read_more_than_dense_attention(budget):
    """Its selecting layers read keys twice: then no time is predicted to be saved."""
    calibrator = Calibrator(engine(), BOOK, replace(WISH, tidal=Tidal(budget=budget)))
    cost = calibrator.cost(Layout((), (0, 2)))
    dense, layer = 4 * cost.layer_bytes, 400 * 2 * 2 * 8 * 4
    assert cost.layer_bytes == layer
    assert cost.bytes_of(Layout((), (0, 2)), budget) == layer * 2 + layer + 2 * layer * budget // 400
    assert cost.ms_per_byte >= 0 and (budget == 16 or cost.ms_per_byte == 0)
    assert cost.ms_of(Layout((0, 1), (2,)), 16) <= cost.dense_ms
    assert dense * cost.ms_per_byte < 100


def test_time_goes_down_with_bytes():
    """Two dense layers of four, of which one selects, and 25 of 100 tokens: 2 + 1/2 + 2/4 of them instead of 4."""
    cost, layout = Cost(4, 100, 1000, (), 5, dense_ms=10.0, ms_per_byte=0.002), Layout((0,), (1,))
    assert cost.bytes_of(layout, 25) == 3000
    assert cost.bytes_of(replace(layout, full_heads=(KVHead(2, 0), KVHead(3, 4))), 25) == 3400
    assert cost.ms_of(layout, 25) == 10 - 0.002 * 1000
    assert cost.said(layout, 25) == "A token reads 0.00 MB of the cache instead of 0.00 MB."


def test_layers_with_a_sliding_window_take_no_part():
    result = calibrated(engine("gemma2"), dense_layers=1, map=True)
    assert {*result.layout.full, *result.layout.select} <= {1, 3}
    assert set(result.head_map) <= {1, 3}
    assert {layer for point in result.curve for layer in (*point.full, *point.select)} <= {1, 3}
    # A layer that sees everything has 400 tokens of 128 bytes, one of the two others 9.
    dense, half = 2 * 400 * 128 + 2 * 9 * 128, result.cost.bytes_of(result.layout, 32) + 2 * 9 * 128
    said = f"a token reads {half / 1e6:.2f} MB of the cache instead of {dense / 1e6:.2f} MB."
    assert result.said().endswith(said) and " 2 of the 4 layers see 9 tokens at most " in result.said()


# What is measured


@pytest.mark.parametrize("tidal", ["kv", "map"])
def test_divergences_are_those_of_tokens_decoded_one_by_one(tidal):
    """Of each question's number, and of the end of each plain text; means however stay those of the context."""
    one = engine()
    calibrator = Calibrator(one, BOOK, replace(WISH, prompts=2, tidal=Tidal(budget=32, means=0)))
    layout = Layout((0,), (1,))
    policy = calibrator.policy(layout, {2: [1, 0], 3: [1, 1]} if tidal == "map" else None)
    measured = calibrator.measured(policy, 1)
    haystack, kls, exact, dense_exact = Haystack(tokenizer(), BOOK, seed=1), [], 0, 0
    for number in (2, 3):
        trial = haystack.trial(400, number, DEPTHS)
        for question in trial.questions:
            kl, own, dense = compared(
                one, policy, trial.context, question.tokens + question.answer, len(question.answer)
            )
            kls.append(kl.mean().item())
            exact += own == question.answer
            dense_exact += dense == question.answer
    assert measured.questions == pytest.approx(kls, rel=1e-3, abs=1e-6)
    assert (measured.exact, measured.dense_exact) == (exact, dense_exact)
    texts = []
    for number in (2, 3):
        context, [(end, predicted)] = calibrator._text(number)
        assert len(end) == TEXT_ROWS and predicted == TEXT_ROWS - 1 and len(context) + len(end) == 400
        assert tokenizer().decode(context + end) in tokenizer().decode(haystack.book)
        texts.append(compared(one, policy, context, end, predicted)[0].mean().item())
    assert measured.texts == pytest.approx(texts, rel=1e-3, abs=1e-6)
    assert min(kls + texts) > 1e-4


def compared(engine, policy, context, tokens, predicted):
    """KL divergences of the last predictions, and the most probable tokens of the policy and of dense attention."""
    rows = []
    for each in (policy, Policy()):
        logits = torch.cat(list(engine.using(each).predictions(context + tokens, len(context))))
        rows.append(logits[-predicted:].double().log_softmax(-1))
    own, dense = rows
    return (dense.exp() * (dense - own)).sum(-1), own.argmax(-1).tolist(), dense.argmax(-1).tolist()


def test_what_is_right_is_counted():
    """An answer is one that all of its tokens are right of; dense answers beside."""
    calibrator = Calibrator(engine(), BOOK, replace(WISH, tidal=Tidal(budget=32, means=0)))
    passage = calibrator.passage(4)
    chain = passage.rows.chain[passage.rows.counted]
    best = passage.dense.argmax(-1)
    answers = torch.where((chain == 1) | (chain == 3), best, (best + 1) % VOCAB)
    answers[(chain == 3).nonzero()[0]] += 1
    vars(passage)["rows"] = replace(passage.rows, answers=answers)
    covering = calibrator.policy(Layout((0,), (1,)), scale=100)
    assert calibrator.budget == 32 and covering.budget == 399
    measured = calibrator.measured(covering, 2)
    assert (measured.exact, measured.dense_exact) == (1, 1)
    assert max(measured.questions) < 1e-5
    vars(passage)["dense"] = passage.dense.roll(1, -1)
    calibrator.partial.measured.clear()
    assert min(calibrator.measured(covering, 2).questions) > 0.1


def test_sets_share_nothing():
    calibrator = Calibrator(engine(), BOOK, replace(WISH, prompts=2))
    sets = [set(calibrator.prompts(which)) for which in range(3)]
    assert [len(own) for own in sets] == [4, 4, 4]
    assert set.union(*sets) == set(range(12)) and all(len({number % 2 for number in own}) == 2 for own in sets)
    asked = [str(calibrator._questions(number)[1]) for number in range(6)]
    contexts = [str(calibrator._text(number)[1]) for number in range(6)]
    assert len(set(asked)) == len(set(contexts)) == 6
    told = [
        question for number in range(6) for question in Haystack(tokenizer(), BOOK, seed=1).trial(400, number).questions
    ]
    assert len({(question.word, question.digits) for question in told}) == len(told)
    # What squares of effects are weighted with sums up to the mean over questions and half of that over texts.
    weights = [calibrator.weight(number) ** 2 for number in calibrator.prompts(0)]
    assert weights == pytest.approx([0.5, 0.25] * 2)


def test_trust():
    """The mean over fresh prompts, and its standard error."""
    fresh = Measured([0.1, 0.2, 0.6], [0.4], [0.02, -0.01, 0.02], exact=1, dense_exact=2)
    made = replace(found(), fresh=fresh)
    assert standard_error([0.1, 0.2, 0.6]) == pytest.approx(0.1527525)
    assert made.trust() == {
        "kl_questions": 0.3,
        "kl_questions_se": 0.15275,
        "kl_text": 0.4,
        "kl_text_se": 0.0,
        "lost": 0.01,
        "lost_se": 0.01,
        "questions": 3,
        "exact_match": 0.3333,
        "exact_match_dense": 0.6667,
    }
    for part in (
        "2 layers' worth",
        "budget of 32 of 400",
        "0.3000 ± 0.1527",
        "0.4000 ± 0.0000",
        "falls by 0.010 ± 0.010",
        "33% of 3",
        "67% under",
    ):
        assert part in made.said()
    assert found().trust()["questions"] == len(DEPTHS)
    for head_map, measured in ((None, found().fresh), (found().head_map, found().mapped)):
        calibrator = Calibrator(deep(), BOOK, WISH)
        assert calibrator.measured(calibrator.policy(found().layout, head_map), 2) == measured
    assert found().mapped != found().fresh


# What is written


@pytest.mark.filterwarnings("error")
def test_the_file_is_what_policies_then_use(tmp_path):
    content = json.loads(json.dumps(found().as_json()))
    path = write(content, tmp_path)
    assert path == tmp_path / "springtide.json" and read_calibration(tmp_path) == content
    assert content["version"] == VERSION
    assert (content["tidal"]["budget"], content["tidal"]["length"]) == (32, 400)
    used = Engine(deep().stack.model, calibration=content)
    policy = used.resolve("tidal:budget=32")
    assert Layout(policy.full, policy.selecting, policy.full_heads) == found().layout
    mapped = used.resolve("tidal:budget=32,heads=map")
    assert {layer: list(sets) for layer, sets in mapped.map} == found().head_map
    assert set(found().head_map) == set(range(6)) - set(policy.dense_layers)
    calibrator = Calibrator(deep(), BOOK, WISH)
    assert mapped == calibrator.policy(found().layout, found().head_map)
    used.using(mapped).generate(tokenizer().encode(BOOK)[:60], max_tokens=2)


@pytest.mark.filterwarnings("error")
def test_brief_calibration_chooses_by_gradients_alone(monkeypatch):
    monkeypatch.setattr(Calibrator, "measured", lambda *_: pytest.fail("tried a layout"))
    *before, content = brief(deep(), BOOK, WISH)
    assert before == [None] * 2
    assert set(content) == {"version", "tidal"}
    assert set(content["tidal"]) == {"full", "select", "full_heads", "budget", "length"}
    policy = Engine(deep().stack.model, calibration=content).resolve("tidal")
    assert worth(Layout(policy.full, policy.selecting, policy.full_heads)) == 2


# Going on


@pytest.fixture
def work(monkeypatch) -> dict[str, int]:
    """How many passages' effects were computed, and how often a policy's divergence on one."""
    done = {"effects": 0, "measured": 0}
    effects, kl_div = Recording.effects, calibration.kl_div

    def counted(name, function):
        def count(*args, **options):
            done[name] += 1
            return function(*args, **options)

        return count

    monkeypatch.setattr(Recording, "effects", counted("effects", effects))
    monkeypatch.setattr(calibration, "kl_div", counted("measured", kl_div))
    return done


def interrupted(engine: Engine, partial: Path, after: int, **options) -> None:
    """Calibrate for some steps only."""
    steps: Iterator[Calibration | None] = calibrate(engine, BOOK, replace(WISH, **options), partial)
    with closing(steps):
        assert list(islice(steps, after)) == [None] * after


@cache
def whole() -> Calibration:
    return calibrated(engine())


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8, 10])
def test_an_interrupted_calibration_goes_on(tmp_path, work, after):
    """And does nothing twice."""
    expected, path = timeless(whole()), tmp_path / "partial"
    work.update(effects=0, measured=0)
    calibrated(engine())
    total = dict(work)
    work.update(effects=0, measured=0)
    interrupted(engine(), path, after)
    assert path.is_file() and work["effects"] == min(after, 2)
    assert timeless(calibrated(engine(), partial=path)) == expected
    assert work == total
    assert list(tmp_path.iterdir()) == [path]


def test_what_comes_in_the_middle_of_a_step_is_done_again(tmp_path, work, monkeypatch):
    path = tmp_path / "partial"
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "kl_div", interrupt_after(3, calibration.kl_div))
        with pytest.raises(KeyboardInterrupt):
            calibrated(engine(), partial=path)
    assert path.is_file() and work == {"effects": 2, "measured": 3}
    assert timeless(calibrated(engine(), partial=path)) == timeless(whole())


def interrupt_after(count: int, function):
    left = iter(range(count))

    def interrupted(*args, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args, **options)

    return interrupted


@pytest.mark.parametrize(
    "options",
    [
        {"length": 380},
        {"tidal": Tidal(budget=16)},
        {"tidal": Tidal(budget=32, heads="kv")},
        {"prompts": 2},
        {"chat": True},
    ],
    ids=str,
)
def test_a_partial_calibration_of_other_options_is_no_use(tmp_path, work, options):
    expected, path = timeless(whole()), tmp_path / "partial"
    interrupted(engine(), path, 1, **options)
    work["effects"] = 0
    assert timeless(calibrated(engine(), partial=path)) == expected
    assert work["effects"] == 2


def test_nor_is_one_of_another_model_or_text(tmp_path, work):
    expected = [timeless(calibrated(engine(), text)) for text in (BOOK, BOOK[::-1])]
    for other in (lambda path: interrupted(deep(), path, 2), lambda path: interrupted(engine(hidden_size=64), path, 2)):
        other(tmp_path / "partial")
        assert timeless(calibrated(engine(), partial=tmp_path / "partial")) == expected[0]
        (tmp_path / "partial").unlink()
    interrupted(engine(), tmp_path / "partial", 6)
    assert timeless(calibrated(engine(), BOOK[::-1], tmp_path / "partial")) == expected[1] != expected[0]


def test_a_partial_calibration_serves_another_number_of_layers(tmp_path, work):
    interrupted(engine(), tmp_path / "partial", 2)
    work["effects"] = 0
    result = calibrated(engine(), partial=tmp_path / "partial", dense_layers=1)
    assert work["effects"] == 0
    assert timeless(result) == timeless(calibrated(engine(), dense_layers=1))


@pytest.mark.parametrize("content", [b"", b"no torch file", None, {}, {"key": 1}, [3]], ids=str)
def test_a_broken_partial_calibration_is_no_use(tmp_path, content):
    path = tmp_path / "partial"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        interrupted(engine(), path, 2)
        path.write_bytes(path.read_bytes()[:-900])
    else:
        key = Calibrator(engine(), BOOK, WISH).key
        torch.save({**content, "key": key} if isinstance(content, dict) else content, path)
    assert timeless(calibrated(engine(), partial=path)) == timeless(whole())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_layers": 4}, "4 dense layers were asked for, but the model has 4 layers .* choose 1 to 3"),
        ({"dense_layers": 0}, "choose 1 to 3"),
        ({"dense_layers": 2, "target_kl": 0.1}, "either --dense-layers or --target-kl, not both"),
        ({"target_kl": 0.0}, "--target-kl is 0.0, but it must be above 0"),
        ({"target_kl": float("nan")}, "must be above 0"),
        ({"tidal": Tidal(budget=400)}, "budget is 400, but must be at least 1 and below the length, 400"),
        ({"tidal": Tidal(budget=0)}, "budget is 0, but must be at least 1"),
        ({"tidal": Tidal(budget=Share(0))}, "budget is 0%, but must be at least 1"),
        ({"tidal": Tidal(budget=Share(120))}, "budget is 120%, but must be at least 1 and below the length"),
        ({"length": 64}, "64 is too short to calibrate at; use more than 64"),
        ({"length": 100}, "100 tokens is too short for 8 facts; use a longer one"),
        ({"length": 1000, "text": BOOK[:1500]}, "The text has .* tokens, but the length is 1000"),
        ({"length": 1024, "text": BOOK * 3}, "model's context holds 1024; use a shorter length"),
        ({"text": "A short text."}, "The text has .* tokens, but the length is 400"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("worked"))
    monkeypatch.setattr("springtide.model.stack.Stack.forward", lambda *_: pytest.fail("worked"))
    with pytest.raises(SpringtideError, match=message) as caught:
        calibrated(engine(), **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(("name", "count"), [("mistral", 0), ("gemma2", 1)])
def test_a_model_without_layers_to_choose(name, count):
    few = engine(name, num_hidden_layers=2)
    for options in ({}, {"dense_layers": 1}):
        with pytest.raises(SpringtideError, match=f"{count} layers without a sliding window, but 2 are needed"):
            calibrated(few, **options)


# The map between heads


class Planted:
    """Stands for a recording: ``effects`` of each pair of layers, ``[N, set, head]``."""

    def __init__(self, effects):
        self.effects = effects

    def by_set(self, selecting, reading):
        return self.effects[selecting, reading]


LAYOUT, PAIRS = Layout((0, 8), (1, 5)), [(1, 3), (1, 4), (5, 7), (5, 9)]
LAYERS = (0, 1, 3, 4, 5, 7, 8, 9)


def planted(seed: int, heads: int, samples: int) -> dict[tuple[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {pair: torch.randn(samples, heads, heads, generator=generator) for pair in PAIRS}


@pytest.mark.parametrize("heads", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_map_that_loses_nothing_is_found(heads, seed):
    effects = planted(seed, heads, 2000)
    truth = torch.randint(0, heads, (len(PAIRS), heads), generator=torch.Generator().manual_seed(seed))
    for sets, own in zip(truth.tolist(), effects.values(), strict=True):
        for head, source in enumerate(sets):
            own[:, source, head] *= 0.01
    learner = MapLearner(LAYOUT, LAYERS)
    assert learner.pairs == PAIRS
    for part in range(2):
        learner.add(Planted({pair: own[part::2] for pair, own in effects.items()}), 1.0)
    assert learner.learn() == {layer: sets for (_, layer), sets in zip(PAIRS, truth.tolist(), strict=True)}


def test_dense_heads_have_no_effect_on_the_map():
    """Whatever they would lose: the other head's set is the one that loses least by itself."""
    effects = planted(0, 2, 500)
    for own in effects.values():
        own[:, :, 1] *= 100
        own[:, 0, 0] *= 0.01
    learner = MapLearner(replace(LAYOUT, full_heads=tuple(KVHead(layer, 1) for _, layer in PAIRS)), LAYERS)
    learner.add(Planted(effects), 1.0)
    assert {sets[0] for sets in learner.learn().values()} == {0}


def test_the_map_is_learnt_from_each_heads_own_set():
    """Which is what the first set of passages says, whatever heads read otherwise."""
    calibrator, learner = Calibrator(deep(), BOOK, WISH), MapLearner(found().layout, range(6))
    for number in calibrator.prompts(0):
        learner.add(calibrator.recording(number, "kv"), calibrator.weight(number))
    assert learner.learn() == found().head_map
    sets = {tuple(sets) for sets in found().head_map.values()}
    assert sets <= set(product(range(2), repeat=2)) and len(sets) > 1


def test_passages_count_by_their_weights():
    first, second = (planted(seed, 2, 500) for seed in (1, 2))
    for effects, source in ((first, 0), (second, 1)):
        for own in effects.values():
            own[:, source] *= 0.01
    for weights, source in (((1.0, 0.1), 0), ((0.1, 1.0), 1)):
        learner = MapLearner(LAYOUT, LAYERS)
        for effects, weight in zip((first, second), weights, strict=True):
            learner.add(Planted(effects), weight)
        assert set(map(tuple, learner.learn().values())) == {(source, source)}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_learnt_map_is_never_predicted_to_be_worse_than_none(seed, heads):
    effects = planted(seed, heads, 6)

    def loss(sets):
        read = [own[:, sets[layer][head], head] for (_, layer), own in effects.items() for head in range(heads)]
        return float(sum(read).square().sum() + sum(x.square().sum() for x in read))

    learner = MapLearner(LAYOUT, LAYERS)
    learner.add(Planted(effects), 1.0)
    learnt = learner.learn()
    assert loss(learnt) <= loss({layer: range(heads) for _, layer in PAIRS}) * (1 + 1e-5)
