"""From a folder or a model to an engine."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import springtide
from folders import PROMPT, VOCAB, edit_json, save_drafter, save_model, tokenizer
from springtide import SpringtideError
from springtide.attention.calibration import VERSION
from springtide.drafting.drafter import Drafter
from springtide.drafting.medusa import Medusa
from springtide.engine.engine import Engine
from springtide.kernels import native
from springtide.loading import calibration_folder, drafting
from tiny import tiny

CALIBRATION = {"version": VERSION, "tidal": {"full": [], "select": [0, 2], "map": {"1": [1, 0], "3": [0, 0]}}}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return springtide.load(folder)


@pytest.fixture
def bars():
    """Progress bars are as they were after the test."""
    yield
    logging.enable_progress_bar()  # those of the hub with it


@pytest.mark.parametrize("hubs", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.usefixtures("bars")
def test_progress_bars_are_left_as_they_were_set(folder, capfd, own, hubs):
    """Those of transformers and of the hub; where nobody watches, none is shown."""
    (logging.enable_progress_bar if own else logging.disable_progress_bar)()
    (enable_progress_bars if hubs else disable_progress_bars)()
    springtide.load(folder)
    assert (logging.is_progress_bar_enabled(), not are_progress_bars_disabled()) == (own, hubs)
    assert capfd.readouterr().err == ""


# -- what can be loaded --------------------------------------------------------------------------------------------


def test_a_folder_gives_the_models_own_tokens(folder, engine):
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = words(PROMPT, return_tensors="pt").input_ids
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    expected = expected[0, ids.shape[1] :].tolist()
    for where in (folder, str(folder)):
        output = springtide.load(where).generate(PROMPT, max_tokens=12)
        assert output.token_ids == expected
        assert output.text == words.decode(expected)
        assert output.finish_reason == "length"


def test_a_loaded_model_with_and_without_a_tokenizer(folder, engine):
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = engine.generate(PROMPT, max_tokens=6)
    for words in (tokenizer(), folder, str(folder)):
        assert springtide.load(model, words).generate(PROMPT, max_tokens=6).text == expected.text
    bare = springtide.load(model)
    output = bare.generate(tokenizer().encode(PROMPT), max_tokens=6)
    assert (output.text, output.token_ids) == ("", expected.token_ids)
    with pytest.raises(SpringtideError, match="no tokenizer"):
        bare.generate(PROMPT)
    with pytest.raises(SpringtideError, match="no tokenizer"):
        bare.stream(tokenizer().encode(PROMPT))


def test_a_folder_with_another_tokenizer(folder, fresh):
    (fresh / "tokenizer.json").unlink()
    assert springtide.load(fresh, tokenizer()).generate(PROMPT, max_tokens=2).text
    assert springtide.load(fresh, folder).generate(PROMPT, max_tokens=2).text


@pytest.mark.parametrize(
    ("wanted", "got"), [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)]
)
def test_dtype(folder, wanted, got):
    engine = springtide.load(folder, dtype=wanted)
    assert engine.stack.model.dtype == got
    sequence = engine.start(engine.encode(PROMPT), springtide.Sampling(max_tokens=2))
    list(engine.run([sequence]))
    assert sequence.cache.read(0, 0, 1)[0].dtype == got


def test_the_checkpoints_dtype_is_kept(tmp_path):
    folder = save_model(tmp_path, dtype=torch.bfloat16)
    assert springtide.load(folder).stack.model.dtype == torch.bfloat16


@pytest.mark.filterwarnings("error")
def test_calibration_is_used_by_a_folder_and_by_a_model_loaded_from_it(fresh):
    (fresh / "springtide.json").write_text(json.dumps(CALIBRATION))
    for model in (fresh, AutoModelForCausalLM.from_pretrained(fresh)):
        policy = springtide.load(model, policy="tidal:budget=8").policy
        assert (policy.full, policy.select, policy.reselect) == ((), 0, (2,))
        assert springtide.load(model, policy="tidal:heads=map").policy.map == ((1, (1, 0)), (3, (0, 0)))


def test_calibration_of_an_earlier_version_is_used_with_a_warning(fresh):
    (fresh / "springtide.json").write_text(json.dumps({"tidal": {"full": [], "select": [0, 2]}}))
    with pytest.warns(UserWarning, match="earlier version.*run `springtide calibrate` again"):
        assert springtide.load(fresh, policy="tidal:budget=8").policy.selecting == (0, 2)


def test_a_model_that_came_from_no_folder_does_not_take_the_working_folders_calibration(tmp_path, monkeypatch):
    (tmp_path / "springtide.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    springtide.load(tiny("qwen3"))


def test_shards_and_tied_embeddings(tmp_path):
    folder = save_model(tmp_path, tie_word_embeddings=True)
    whole = springtide.load(folder).generate(PROMPT, max_tokens=6).token_ids
    (folder / WEIGHTS).unlink()
    tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=True).save_pretrained(
        folder, max_shard_size="60KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert springtide.load(folder).generate(PROMPT, max_tokens=6).token_ids == whole


# -- where calibrations are kept ------------------------------------------------------------------------------------


def other(first: int) -> dict:
    """Another calibration."""
    return {"version": VERSION, "tidal": {"full": list(range(first)), "select": [first]}}


def selecting(model: Any) -> int:
    return springtide.load(model, policy="tidal:budget=8").policy.select


@pytest.mark.filterwarnings("error")
def test_the_users_own_calibration_of_a_model_that_is_not_theirs_to_write_to(tmp_path, home, monkeypatch):
    """Of the hub's cache: what calibration writes lies in the user's folder, and wins over what came with the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = save_model(tmp_path / "hub" / "models--a--b" / "snapshots" / "0123")
    (folder / "springtide.json").write_text(json.dumps(other(2)))
    assert selecting(folder) == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    place = calibration_folder(model)
    assert place.is_relative_to(home / "data" / "springtide" / "calibrations")
    place.mkdir(parents=True)
    (place / "springtide.json").write_text(json.dumps(other(1)))
    for each in (folder, model):
        assert selecting(each) == 1
    model.name_or_path = "a/b"  # as of a model that transformers fetched
    assert selecting(model) == 1 and calibration_folder(model) == place


@pytest.mark.filterwarnings("error")
def test_a_models_own_folder_comes_first(fresh, home):
    model = AutoModelForCausalLM.from_pretrained(fresh)
    assert calibration_folder(model) == fresh
    model.name_or_path = ""
    kept = calibration_folder(model)
    kept.mkdir(parents=True)
    (kept / "springtide.json").write_text(json.dumps(other(1)))
    assert selecting(fresh) == 1  # the same model, whatever folder it lies in
    (fresh / "springtide.json").write_text(json.dumps(other(2)))
    assert selecting(fresh) == 2


def test_layers_are_found_for_each_of_several_that_drafts_by_itself(fresh, monkeypatch):
    asked = []
    monkeypatch.setattr("springtide.loading.know_layers", lambda engine, policies: asked.append(list(policies)))
    engine = springtide.load(fresh)
    asked.clear()
    drafting(engine, "lookup,self:policy=(streaming:budget=16)")
    assert [[policy.name for policy in policies] for policies in asked] == [["streaming"]]


def test_the_bundled_model_is_not_the_users_to_write_to(home):
    engine = springtide.load("pocket")
    assert calibration_folder(engine.stack.model).is_relative_to(home)


# -- what cannot ---------------------------------------------------------------------------------------------------


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def lose_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024).save_pretrained(folder, max_shard_size="60KB")
    next(folder.glob("model-00002-of-*")).unlink()


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def configure(**settings: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(settings))


def lose_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (write("config.json", "{"), r"config\.json' is broken"),
    "config is no object": (write("config.json", "[]"), r"config\.json' is broken"),
    "config is empty": (write("config.json", "{}"), "names no model_type"),
    "config is nonsense": (configure(hidden_size="many"), r"config\.json' cannot be used .*hidden_size"),
    "config of another size": (configure(hidden_size=64), "of another shape than the configuration says"),
    "impossible config": (configure(num_attention_heads=0), "cannot be read"),
    "unsupported architecture": (configure(model_type="gpt2"), "Architecture 'gpt2' is not supported.*Llama, .*Qwen3"),
    "unknown architecture": (configure(model_type="nosuch"), "Architecture 'nosuch' is not supported"),
    "own code": (
        configure(model_type="nosuch", auto_map={"AutoConfig": "configuration_nosuch.NoSuch"}),
        "Architecture 'nosuch' is not supported",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
    "half a file": (truncate, "weights .* cannot be read .*download the model again"),
    "lost shard": (lose_shard, "lacks 1 of . weight files, such as 'model-00002"),
    "broken index": (write(INDEX, "{"), "index.json' is broken"),
    "index that says nothing": (write(INDEX, '{"weight_map": []}'), "does not say where the weights are"),
    "lost tensor": (drop_tensor, "lack 1 tensor .*such as 'model.layers.1.mlp.up_proj.weight'"),
    "NaN": (put_nan, "Tensor 'model.layers.2.mlp.up_proj.weight' .* NaN"),
    "broken generation config": (write("generation_config.json", "{"), "generation_config.json' is broken"),
    "no tokenizer": (lose_tokenizer, "no usable tokenizer"),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
    "broken tokenizer": (write("tokenizer.json", '{"version": "1.0"}'), "no usable tokenizer"),
    "broken tokenizer config": (write("tokenizer_config.json", "[]"), "no usable tokenizer"),
    "broken calibration": (write("springtide.json", "{"), r"springtide\.json' is broken"),
    "empty calibration": (write("springtide.json", "{}"), r"springtide\.json' is broken"),
    **{
        f"calibration with a map of {name}": (
            write("springtide.json", json.dumps({**CALIBRATION, "tidal": {**CALIBRATION["tidal"], "map": wrong}})),
            r"springtide\.json' is broken .*; run `springtide calibrate` again or delete the file",
        )
        for name, wrong in {
            "words": {"1": ["a", "b"]},
            "fractions": {"1": [0.5, 1]},
            "no layers": {"first": [0, 1]},
            "no sets": {"1": 0},
            "nothing": None,
            "lists": [[0, 1]],
        }.items()
    },
    "calibration of another model": (
        write("springtide.json", '{"tidal": {"full": [0], "select": [1, 9]}}'),
        r"springtide\.json names layer 9, .* 0, 1, 2, 3; run `springtide calibrate` again",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_a_sentence(fresh, case, capfd, monkeypatch):
    damage, message = BROKEN[case]
    damage(fresh)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    with pytest.raises(SpringtideError, match=message) as caught:
        springtide.load(fresh)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "Traceback" not in capfd.readouterr().err


def test_calibration_of_another_model_does_not_hinder_calibrating(fresh):
    write("springtide.json", "{")(fresh)
    springtide.load(fresh, calibrated=False)


@pytest.mark.parametrize("name", ["nosuch", "some/model", ""])
def test_no_such_folder(name):
    with pytest.raises(SpringtideError, match=f"There is no model folder '{name}'"):
        springtide.load(name)


@pytest.mark.parametrize("model", [None, 5, torch.nn.Linear(2, 2)])
def test_what_is_no_model(model):
    name = type(model).__name__
    message = f"A model is a folder, a name on the hub or a Hugging Face model, but not {name}"
    with pytest.raises(SpringtideError, match=message):
        springtide.load(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "Unknown dtype 'int8': choose one of float32"),
        ({"dtype": torch.int8}, "Unknown dtype"),
        ({"device": "gpu"}, "Unknown device 'gpu': use cpu, cuda"),
        ({"device": "meta"}, "Unknown device 'meta'"),
        ({"device": "cuda:99"}, "Device 'cuda:99' cannot be used"),
        ({"policy": "fast"}, "Unknown policy 'fast': choose one of dense, tidal"),
        ({"policy": "tidal:speed=2"}, "no option 'speed'; its options are: budget"),
        ({"policy": "tidal:budget=many"}, "must be a whole number"),
        ({"policy": "tidal:budget=0"}, "at least 1"),
        ({"policy": "tidal:full=0,select=17,reselect=2"}, "no layer 17"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(SpringtideError, match=message):
        springtide.load(folder, **options)


def test_a_loaded_model_is_not_converted_behind_the_users_back():
    with pytest.raises(SpringtideError, match=r"model\.to\(dtype\)"):
        springtide.load(tiny("qwen3"), dtype="bfloat16")


def test_a_loaded_model_of_an_unsupported_architecture():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
    with pytest.raises(SpringtideError, match="Architecture 'gpt2' is not supported; supported are Llama"):
        springtide.load(model)


# -- drafters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafter(folder, tmp_path_factory) -> Path:
    return save_drafter(tmp_path_factory.mktemp("drafter"), folder)


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory) -> Path:
    return save_drafter(tmp_path_factory.mktemp("adapted"), folder, adapter=True)


def test_drafters_by_folder_and_as_objects_leave_the_output_as_it_is(folder, engine, drafter):
    expected = engine.generate(PROMPT, max_tokens=24).token_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    for target in (folder, model):
        for draft in (drafter, str(drafter), Medusa.load(drafter)):
            drafted = springtide.load(target, tokenizer(), draft=draft)
            assert drafted.drafter.name == "medusa"
            output = drafted.generate(PROMPT, max_tokens=24)
            assert output.token_ids == expected
            assert output.stats.drafted_tokens > 0


def test_drafters_by_name(folder, fresh, engine, drafter):
    expected = engine.generate(PROMPT, max_tokens=24).token_ids
    shutil.copytree(drafter, fresh / "drafters" / "medusa")
    for draft in ("lookup", "medusa"):
        for target in (fresh, AutoModelForCausalLM.from_pretrained(fresh)):
            drafted = springtide.load(target, tokenizer(), draft=draft)
            assert drafted.drafter.name == draft
            assert drafted.generate(PROMPT, max_tokens=24).token_ids == expected


def test_the_tree_is_chosen_by_what_rows_cost(folder, drafter, monkeypatch):
    sizes = {}
    for name, cost in {"free": lambda rows: 1.0, "dear": lambda rows: 10.0**rows}.items():
        monkeypatch.setattr("springtide.engine.engine.cost_of_rows", lambda stack, policy, cost=cost: cost)
        sizes[name] = len(springtide.load(folder, draft=drafter).drafter.shape.parents)
    assert sizes["free"] > 16 and sizes["dear"] == 1
    kept = Engine(springtide.load(folder).stack.model, drafter=Medusa.load(drafter))
    assert len(kept.drafter.shape.parents) == 16


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_into_the_loaded_weights(folder, adapted, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer().encode(PROMPT)])
    with torch.no_grad():
        before = model(ids).logits
        expected = PeftModel.from_pretrained(model, str(adapted / "adapter"))(ids).logits
        with pytest.warns(UserWarning, match="changes the model: its adapter is merged into the weights") as said:
            engine = springtide.load(folder, draft=adapted, dtype=dtype)
        assert len(said) == 1 and "\n" not in str(said[0].message)
        got = engine.stack.model(ids).logits
    assert type(engine.stack.model) is type(AutoModelForCausalLM.from_pretrained(folder))
    if dtype == "float32":
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - expected).abs().mean() < 0.1 * (before - expected).abs().mean()
    assert engine.drafter.name == "medusa"
    assert native.level() is None or all(layer.block for layer in engine.stack.fused)
    plain = engine.drafting(Drafter())
    assert engine.generate(PROMPT, max_tokens=12).token_ids == plain.generate(PROMPT, max_tokens=12).token_ids


def test_a_loaded_model_is_not_changed_by_an_adapter(folder, adapted):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(SpringtideError, match=r"adapter, which would change your model; .*the model's folder"):
        springtide.load(model, draft=adapted)


def lose_adapters(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter" / name).unlink()


def of_another_model(folder: Path) -> None:
    save_drafter(folder, save_model(folder.parent / "other", hidden_size=64), adapter=True)


def deeper(folder: Path) -> None:
    """The adapter lacks what a deeper model needs."""
    weights = folder / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if ".layers.3." not in name}
    save_file(tensors, weights)


def spoil(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights)


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json, so it is not a drafter's"),
    "config is no JSON": (write("config.json", "{"), r"config\.json' is broken"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no model.safetensors"),
    "unknown kind": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(drafter="oracle")),
        "holds a drafter 'oracle', which this version does not know",
    ),
    "another model's": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(base="0" * 16)),
        "trained for another model",
    ),
    "no adapter config": (lose_adapters("adapter_config.json"), "lacks adapter_config.json"),
    "no adapter weights": (lose_adapters("adapter_model.safetensors"), "lacks adapter_model.safetensors"),
    "broken adapter config": (write("adapter/adapter_config.json", "{"), "adapter' cannot be used"),
    "broken adapter weights": (write("adapter/adapter_model.safetensors", "x"), "adapter' cannot be used"),
    "another model's adapter": (of_another_model, "adapter' cannot be used .*trained for this model, or get it again"),
    "adapter of fewer layers": (deeper, "adapter' cannot be used"),
    "adapter with NaN": (spoil, "holds NaN"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_drafter_that_is_broken_or_does_not_fit(folder, adapted, tmp_path, case, capfd):
    damage, message = UNFIT[case]
    shutil.copytree(adapted, tmp_path / "drafter")
    damage(tmp_path / "drafter")
    with pytest.raises(SpringtideError, match=message) as caught:
        springtide.load(folder, draft=tmp_path / "drafter")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["nosuch", "", "some/drafter"])
def test_no_such_drafter(folder, name):
    with pytest.raises(SpringtideError, match=f"no drafter '{name}': choose lookup, .*, longspec, self, or give"):
        springtide.load(folder, draft=name)


@pytest.mark.parametrize("name", ["medusa", "medusa2", "hidden-transfer", "longspec"])
def test_a_model_without_drafters(folder, name):
    for target in (folder, AutoModelForCausalLM.from_pretrained(folder), tiny("qwen3")):
        with pytest.raises(SpringtideError, match=f"no drafter '{name}' beside this model .*springtide train"):
            springtide.load(target, draft=name)


def test_an_adapter_needs_peft(folder, adapted, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SpringtideError, match=r"needs the package peft; run pip install 'springtide\[train\]'"):
        springtide.load(folder, draft=adapted)
