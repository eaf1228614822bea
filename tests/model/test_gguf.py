"""GGUF files: what transformers makes of them, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import springtide
from folders import PROMPT, VOCAB, tokenizer
from springtide import SpringtideError
from springtide.loading import calibration_folder
from tiny import tiny

gguf = pytest.importorskip("gguf")

SIZE = {"vocab_size": VOCAB, "max_position_embeddings": 512, "intermediate_size": 64, "rms_norm_eps": 1e-6}
MODELS = {"llama": {"rope_parameters": None}, "qwen2": {"use_sliding_window": False, "layer_types": None}}


def model(name: str, **changes: Any):
    return tiny.__wrapped__(name, **{**SIZE, **MODELS[name], **changes})


def write(path: Path, name: str = "qwen2", kind: str = "F32", words: bool = True, **fields: Any) -> Path:
    """A tiny model as a GGUF file. ``fields`` are metadata of its architecture, beside what it needs."""
    own = model(name)
    config, writer = own.config, gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for field, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{name}.{field.replace('_', '.')}", value)
    writer.add_vocab_size(config.vocab_size)
    if words:
        add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    for tensor, weight in own.named_parameters():
        data = weight.detach()
        if name == "llama" and tensor.endswith(("q_proj.weight", "k_proj.weight")):
            data = data.view(-1, 2, 4, data.shape[1]).transpose(1, 2).reshape(data.shape)  # pairs are neighbours
        stored = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        suffix = "." + tensor.rsplit(".", 1)[1]
        writer.add_tensor(
            names.get_name(tensor, try_suffixes=(suffix,)), gguf.quantize(data.numpy(), stored), raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any) -> None:
    words = json.loads(tokenizer().backend_tokenizer.to_str())
    known = {**words["model"]["vocab"], **{word["content"]: word["id"] for word in words["added_tokens"]}}
    special = {word["id"] for word in words["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(known, key=known.__getitem__))
    writer.add_token_types([3 if number in special else 1 for number in sorted(known.values())])
    writer.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def by_transformers(path: Path, dtype: torch.dtype = torch.float32) -> list[int]:
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    words = AutoTokenizer.from_pretrained(**where)
    ids = words(PROMPT, return_tensors="pt").input_ids
    own = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    out = own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_tokens_are_those_of_transformers(tmp_path, name, kind):
    path = write(tmp_path / "model.gguf", name, kind)
    expected = by_transformers(path)
    for where in (path, str(path)):
        engine = springtide.load(where)
        assert engine.generate(PROMPT, max_tokens=24).token_ids == expected
    assert engine.stack.model.dtype == torch.float32
    if kind == "F32":
        original = springtide.engine.engine.Engine(model(name), tokenizer())
        assert original.generate(PROMPT, max_tokens=24).token_ids == expected


def test_dtype_and_chat_template(tmp_path):
    engine = springtide.load(write(tmp_path / "model.gguf", kind="Q8_0"), dtype="bfloat16")
    assert engine.stack.model.dtype == torch.bfloat16
    assert engine.chat([{"role": "user", "content": PROMPT}], max_tokens=4).token_ids


def test_a_tokenizer_from_elsewhere(tmp_path, folder):
    path = write(tmp_path / "model.gguf", words=False)
    expected = springtide.load(write(tmp_path / "whole.gguf")).generate(PROMPT, max_tokens=6).token_ids
    assert springtide.load(path, folder).generate(PROMPT, max_tokens=6).token_ids == expected
    with pytest.raises(SpringtideError, match=r"model\.gguf' holds no usable tokenizer .*; give .* folder\.$"):
        springtide.load(path)


def test_calibrations_are_not_written_beside_the_file(tmp_path, home):
    path = write(tmp_path / "model.gguf")
    folder = calibration_folder(springtide.load(path).stack.model)
    assert folder.is_relative_to(home / "data") and os.listdir(tmp_path) == ["model.gguf"]


def test_drafters_lie_elsewhere(tmp_path):
    (tmp_path / "drafters" / "medusa").mkdir(parents=True)
    path = write(tmp_path / "model.gguf")
    with pytest.raises(SpringtideError, match="There is no drafter 'medusa' beside this model"):
        springtide.load(path, draft="medusa")
    assert springtide.load(path, draft="lookup").generate(PROMPT, max_tokens=4).token_ids


# -- what cannot be used --------------------------------------------------------------------------------------------


def refused(path: object, *parts: str) -> None:
    with pytest.raises(SpringtideError) as caught:
        springtide.load(path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and all(part in message for part in parts), message


@pytest.mark.parametrize("share", [0.9999, 0.5, 0.01, 0])
def test_a_file_that_was_cut_short(tmp_path, share):
    path = write(tmp_path / "model.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, f"'{path}' is no whole GGUF file; download it again.")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.gguf").write_text("not a model at all, but text that is long enough")
    refused(tmp_path / "model.gguf", "is no whole GGUF file")
    (tmp_path / "model.bin").write_text("no")
    refused(tmp_path / "model.bin", "is a file, but no .gguf file; give one, a model folder, or a name on the hub.")


@pytest.mark.parametrize("kind", ["falcon", "mamba2", "gpt2", "nosuch"])
def test_another_architecture(tmp_path, kind):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "model.gguf", f"Architecture '{kind}' is not supported", "Llama")


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "olmo2")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "model.gguf", "cannot be used (GGUF model with architecture olmo2", "Hugging Face folder")


def test_tensors_that_are_missing(tmp_path, monkeypatch):
    own = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tensor", lambda self, name, *a, **k: "ffn_up" in name or own(self, name, *a, **k)
    )
    refused(write(tmp_path / "model.gguf"), "lack 4 tensors that the model needs, such as 'model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_packages(tmp_path, monkeypatch, package):
    path = write(tmp_path / "model.gguf")
    monkeypatch.setattr("springtide.model.gguf.find_spec", lambda name: None if name == package else object())
    refused(path, f"GGUF files need the package {package}; run pip install 'springtide[gguf]'.")


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "nosuch.gguf", "There is no file '", "nosuch.gguf'; give a folder")


def test_a_folder_with_nothing_but_such_files(tmp_path):
    path = write(tmp_path / "model.gguf")
    refused(tmp_path, f"'{tmp_path}' holds no config.json", f"give a file in it, such as '{path}'")


# -- what transformers passes over ----------------------------------------------------------------------------------


YARN = {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0}


@pytest.mark.parametrize("fields", [YARN, {"rope_scaling_type": "linear"}])
def test_rotary_scaling_that_is_not_read_is_not_passed_over(tmp_path, fields):
    path = write(tmp_path / "model.gguf", **fields)
    with pytest.warns(UserWarning, match="rotary embeddings that transformers does not read from GGUF files"):
        springtide.load(path)


@pytest.mark.filterwarnings("error:.*rotary")
def test_rotary_embeddings_without_scaling(tmp_path):
    springtide.load(write(tmp_path / "model.gguf", rope_scaling_type="none"))
    springtide.load(write(tmp_path / "other.gguf", "llama"))
