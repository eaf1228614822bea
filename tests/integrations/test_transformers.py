"""``model.generate(custom_generate=springtide.hf_generate)`` is ``model.generate``, for all that it accepts."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
    TopPLogitsWarper,
    set_seed,
)

import springtide
from folders import VOCAB, save_drafter, save_model, tokenizer
from guesses import Guesses
from springtide import SpringtideError
from springtide.attention.calibration import VERSION
from springtide.drafting.medusa import Medusa
from springtide.evaluation import brief
from tiny import random_tokens

OURS = {"custom_generate": springtide.hf_generate}
GREEDY = {"do_sample": False, "max_new_tokens": 16}
PAD = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("model")))


def prompts(*lengths: int, left: bool = True) -> dict[str, torch.Tensor]:
    """Prompts of these lengths in one padded batch."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = torch.tensor(random_tokens(length, seed=length, vocab=VOCAB))
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model, inputs, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return model.generate(**inputs, **options, **OURS), model.generate(**inputs, **options)


def some_output_token(model, inputs, at: int) -> int:
    return int(model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] + at])


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("lengths", [(9,), (9, 9), (3, 20, 1)])
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"do_sample": False},
        {"do_sample": False, "max_length": 33},
        {"do_sample": False, "generation_config": GenerationConfig(max_new_tokens=5, pad_token_id=PAD)},
        {**GREEDY, "repetition_penalty": 1.3},
        {**GREEDY, "prompt_lookup_num_tokens": 3},
    ],
)
def test_greedy_equals_transformers(model, lengths, options):
    if "prompt_lookup_num_tokens" in options and len(lengths) > 1:
        lengths = lengths[:1]  # transformers assists one sequence only
    ours, theirs = both(model, prompts(*lengths), **options)
    assert torch.equal(ours, theirs)


def test_without_a_mask(model):
    ours, theirs = both(model, {"input_ids": prompts(12)["input_ids"]}, **GREEDY)
    assert torch.equal(ours, theirs)


def test_prompts_padded_on_the_right_give_what_each_gives_alone(model):
    inputs = prompts(5, 11, left=False)
    ours = model.generate(**inputs, **GREEDY, **OURS)[:, 11:]
    for row, length in enumerate((5, 11)):
        assert torch.equal(ours[row], model.generate(**prompts(length), **GREEDY)[0, length:])


@pytest.mark.parametrize("pad", [PAD, None])
def test_end_of_sequence_stops_each_row(model, pad):
    inputs = prompts(8, 8, 5)
    ends = [some_output_token(model, inputs, at) for at in (6, 3)]
    for eos in (ends[0], ends):
        ours, theirs = both(model, inputs, **GREEDY, eos_token_id=eos, pad_token_id=pad)
        assert torch.equal(ours, theirs)
    one = prompts(8)
    ours, theirs = both(model, one, **GREEDY, eos_token_id=ends)
    assert ours.shape[1] < 8 + 16
    assert torch.equal(ours, theirs)


def test_stop_strings(model):
    inputs = prompts(8)
    text = tokenizer().decode(model.generate(**inputs, **GREEDY)[0, 8:])
    words = re.findall("[A-Za-z ]{2,}", text[4:])
    for stop in (words[0], [words[1], "never there"]):
        ours, theirs = both(model, inputs, **GREEDY, stop_strings=stop, tokenizer=tokenizer())
        assert ours.shape[1] < 8 + 16
        assert torch.equal(ours, theirs)
        listed = StoppingCriteriaList([StopStringCriteria(tokenizer(), stop)])
        assert torch.equal(model.generate(**inputs, **GREEDY, stopping_criteria=listed, **OURS), theirs)


def test_stop_strings_without_a_tokenizer(model):
    with pytest.raises(SpringtideError, match="give generate tokenizer"):
        model.generate(**prompts(4), **GREEDY, stop_strings="a", **OURS)


class AfterFive(StoppingCriteria):
    """Stops a sequence that is five tokens longer than its prompt of eight."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 13)


def test_stopping_criteria_are_applied(model):
    ours, theirs = both(model, prompts(8, 3), **GREEDY, stopping_criteria=StoppingCriteriaList([AfterFive()]))
    assert ours.shape[1] == 13
    assert torch.equal(ours, theirs)
    soon = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0, initial_timestamp=time.time() - 1)])
    assert model.generate(**prompts(8), **GREEDY, stopping_criteria=soon, **OURS).shape[1] == 9


# -- sampling ------------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "max_new_tokens": 12}


def seeded(model, seed: int, **options) -> torch.Tensor:
    set_seed(seed)
    return model.generate(**prompts(9), **SAMPLED, **options, **OURS)


def test_sampling_follows_the_global_seed(model):
    assert torch.equal(seeded(model, 1), seeded(model, 1))
    assert not torch.equal(seeded(model, 1), seeded(model, 2))
    set_seed(1)
    first, second = (model.generate(**prompts(9), **SAMPLED, **OURS) for _ in range(2))
    assert not torch.equal(first, second)


def test_return_sequences_differ(model):
    found = seeded(model, 1, num_return_sequences=4)
    assert len({tuple(row.tolist()) for row in found}) == 4


def test_sampling_options_reach_the_engine(model):
    greedy = model.generate(**prompts(9), do_sample=False, max_new_tokens=12)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert torch.equal(seeded(model, 3, **narrow), greedy)
    assert not torch.equal(seeded(model, 3, top_k=0, temperature=5.0), greedy)


def test_the_distribution_is_that_of_transformers(model):
    options = {"do_sample": True, "max_new_tokens": 1, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    seen = []
    for extra in (OURS, {}):
        set_seed(0)
        ids = model.generate(**prompts(9), **options, num_return_sequences=200, **extra)[:, 9]
        seen.append(set(ids.tolist()))
    assert seen[0] == seen[1]


# -- streaming and what is returned --------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_streamer_gets_the_same_text(model, capsys, skip_prompt):
    shown = []
    for extra in (OURS, {}):
        model.generate(**prompts(9), **GREEDY, streamer=TextStreamer(tokenizer(), skip_prompt=skip_prompt), **extra)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_a_streamer_of_another_thread_is_ended(model):
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=30)
    work = threading.Thread(target=lambda: model.generate(**prompts(9), **GREEDY, streamer=streamer, **OURS))
    work.start()
    text = "".join(streamer)
    work.join()
    assert text == tokenizer().decode(model.generate(**prompts(9), **GREEDY)[0, 9:])


class Collector:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_then_single_tokens_up_to_the_stop(model):
    streamer = Collector()
    listed = StoppingCriteriaList([AfterFive()])
    out = model.generate(**prompts(8), **GREEDY, stopping_criteria=listed, streamer=streamer, **OURS)[0].tolist()
    assert streamer.got == [out[:8], *([token] for token in out[8:])]
    assert len(out) == 13
    assert streamer.ended


def test_a_streamer_takes_one_sequence(model):
    with pytest.raises(SpringtideError, match="one sequence"):
        model.generate(**prompts(8, 8), **GREEDY, streamer=Collector(), **OURS)


def test_return_dict(model):
    inputs = prompts(9, 4)
    ours = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, **OURS)
    assert torch.equal(ours.sequences, model.generate(**inputs, **GREEDY))


# -- drafters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafter(model, tmp_path_factory):
    return save_drafter(tmp_path_factory.mktemp("drafter"), Path(model.name_or_path))


def test_a_drafter_leaves_the_output_as_it_is(model, drafter):
    inputs = prompts(9, 4)
    expected = model.generate(**inputs, **GREEDY)
    for draft in ("lookup", drafter, str(drafter), Medusa.load(drafter)):
        assert torch.equal(model.generate(**inputs, **GREEDY, draft=draft, **OURS), expected)
    assert torch.equal(seeded(model, 4, draft=drafter), seeded(model, 4))


def test_the_drafter_is_asked(model):
    expected = model.generate(**prompts(9), **GREEDY)
    knowing = Guesses(expected.tolist(), "oracle", vocab=VOCAB)
    assert torch.equal(model.generate(**prompts(9), **GREEDY, draft=knowing, **OURS), expected)
    assert 0 < knowing.calls < 8
    streamer = Collector()
    model.generate(**prompts(9), **GREEDY, draft=knowing, streamer=streamer, **OURS)
    assert streamer.got == [expected[0, :9].tolist(), *([token] for token in expected[0, 9:].tolist())]


def test_stopping_criteria_among_drafted_tokens(model):
    plain = model.generate(**prompts(8), **GREEDY)
    listed = {"stopping_criteria": StoppingCriteriaList([AfterFive()])}
    expected = model.generate(**prompts(8), **GREEDY, **listed)
    knowing = Guesses(plain.tolist(), "oracle", vocab=VOCAB)
    assert torch.equal(model.generate(**prompts(8), **GREEDY, **listed, draft=knowing, **OURS), expected)


def test_drafters_that_cannot_be(model, tmp_path):
    with pytest.raises(SpringtideError, match="There is no drafter 'nosuch'"):
        model.generate(**prompts(4), **GREEDY, draft="nosuch", **OURS)
    adapted = save_drafter(tmp_path, Path(model.name_or_path), adapter=True)
    with pytest.raises(SpringtideError, match="an adapter, which would change your model"):
        model.generate(**prompts(4), **GREEDY, draft=adapted, **OURS)


# -- policies ------------------------------------------------------------------------------------------------------

LAYERS = "full=0,select=1"


def test_a_sparse_policy(model):
    inputs = prompts(200)
    options = {**GREEDY, "max_new_tokens": 48}
    dense = model.generate(**inputs, **options)
    ours = model.generate(**inputs, **options, policy=f"tidal:budget=12,{LAYERS}", **OURS)
    alone = springtide.load(model, policy=f"tidal:budget=12,{LAYERS}").generate(
        inputs["input_ids"][0].tolist(), max_tokens=48
    )
    assert ours[0, 200:].tolist() == alone.token_ids
    assert not torch.equal(ours, dense)
    covering = model.generate(**inputs, **options, policy=f"tidal:budget=900,{LAYERS}", **OURS)
    assert torch.equal(covering, dense)


@pytest.mark.filterwarnings("error::UserWarning")
def test_calibration_of_the_models_folder_is_used(tmp_path):
    folder = save_model(tmp_path)
    (folder / "springtide.json").write_text(json.dumps({"version": VERSION, "tidal": {"full": [0], "select": [1]}}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs, options = prompts(100), {**GREEDY, "max_new_tokens": 24}
    calibrated = model.generate(**inputs, **options, policy="tidal:budget=12", **OURS)
    assert torch.equal(calibrated, model.generate(**inputs, **options, policy=f"tidal:budget=12,{LAYERS}", **OURS))


@pytest.mark.filterwarnings("error::UserWarning")
def test_without_calibration_there_is_a_sentence_unless_one_is_kept(tmp_path, monkeypatch):
    model, inputs = AutoModelForCausalLM.from_pretrained(save_model(tmp_path)), prompts(100)
    with pytest.raises(SpringtideError, match="not calibrated; run `springtide calibrate --model DIR` once"):
        model.generate(**inputs, **GREEDY, policy="tidal:budget=12", **OURS)
    monkeypatch.setattr(brief, "LENGTH", 300)
    monkeypatch.setattr(brief, "PROMPTS", 1)
    with pytest.warns(UserWarning, match="was not calibrated"):
        engine = springtide.load(tmp_path, policy="tidal:budget=12")
    ours = model.generate(**inputs, **GREEDY, policy="tidal:budget=12", **OURS)
    expected = engine.generate(inputs["input_ids"][0].tolist(), max_tokens=GREEDY["max_new_tokens"])
    assert ours[0, 100:].tolist() == expected.token_ids


@pytest.mark.filterwarnings("error::UserWarning")
def test_calibration_in_the_working_folder_is_not(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    model.config._name_or_path = ""
    (tmp_path / "springtide.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    model.generate(**prompts(4), **GREEDY, **OURS)


# -- what is refused -----------------------------------------------------------------------------------------------


class Mine(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "no beam search"),
        ({"num_beams": 2, "do_sample": True}, "no beam sample"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "no contrastive search"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[5]]}, "NoBadWordsLogitsProcessor"),
        ({"eos_token_id": 5, "min_new_tokens": 4}, "MinLengthLogitsProcessor"),
        ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper"),
        ({"renormalize_logits": True}, "LogitNormalization"),
        ({"logits_processor": LogitsProcessorList([Mine()])}, "logits processor Mine"),
        ({"logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5)]), "do_sample": True}, "in this order"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"policy": "fast"}, "Unknown policy 'fast'"),
        ({"policy": "tidal:budget=0"}, "at least 1"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(model, options, message):
    with pytest.raises(SpringtideError, match=message):
        model.generate(**prompts(6), **{"max_new_tokens": 4, "do_sample": False, **options}, **OURS)


@pytest.mark.parametrize("lengths", [(9,), (3, 20, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2},
    ],
)
def test_scores_and_logits_are_those_of_transformers(model, lengths, options):
    """Given the same tokens: of a sample, those that were drawn here."""
    inputs = prompts(*lengths)
    ours = model.generate(
        **inputs, **GREEDY | options, **OURS, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    width = inputs["input_ids"].shape[1]
    assert len(ours.scores) == len(ours.logits) == ours.sequences.shape[1] - width == 16
    drawn = options.get("do_sample", False)
    for step in range(16) if drawn else (0, 7, 15):
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), step, dtype=torch.long)], dim=1)
        theirs = model.generate(
            ours.sequences[:, : width + step],
            attention_mask=mask,
            **{**GREEDY, **options, "max_new_tokens": 1},
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        torch.testing.assert_close(ours.logits[step], theirs.logits[0], atol=1e-4, rtol=1e-4)
        if "repetition_penalty" not in options or len(lengths) == 1:  # theirs counts the padding too
            torch.testing.assert_close(ours.scores[step], theirs.scores[0], atol=1e-4, rtol=1e-4)
        chosen = ours.sequences[:, width + step, None]
        assert (ours.scores[step].gather(1, chosen) > -torch.inf).all()


def test_scores_end_where_a_sequence_does(model):
    inputs = prompts(9, 9)
    end = some_output_token(model, prompts(9), at=4)
    ours = model.generate(
        **inputs, **GREEDY, **OURS, eos_token_id=end, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True
    )
    assert ours.logits is None
    assert len(ours.scores) == ours.sequences.shape[1] - inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **GREEDY, **OURS, return_dict_in_generate=True)
    assert plain.scores is None and plain.logits is None


def test_embeddings_are_refused(model):
    embeddings = model.get_input_embeddings()(prompts(6)["input_ids"])
    with pytest.raises(SpringtideError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeddings, **GREEDY, **OURS)


def test_hf_generate_is_not_for_calling(model):
    with pytest.raises(SpringtideError, match=r"model\.generate"):
        springtide.hf_generate(model, prompts(4)["input_ids"])


def test_training_mode_is_kept(model):
    model.train()
    try:
        model.generate(**prompts(6), **GREEDY, **OURS)
        assert model.training
    finally:
        model.eval()
    model.generate(**prompts(6), **GREEDY, **OURS)
    assert not model.training
