"""The model: sizes, identities, pruning, controls, files."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, pipeline

from springtide.errors import SpringtideError
from springtide.vision.dependency_vit import (
    MODELS,
    SCORES,
    DependencyViTConfig,
    DependencyViTForImageClassification,
    DependencyViTForMaskedImageModeling,
    DependencyViTModel,
    counts,
    create_model,
)
from springtide.vision.images import DependencyViTImageProcessor

POCKET = "dependency_vit_pocket_patch8_64"
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "prune_after": (1, 2),
}


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = DependencyViTModel(DependencyViTConfig(**{**SMALL, **options})).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():  # so that gates and selectors differ from token to token
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def images(batch=2, size=32, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("dependency_vit_tiny_patch16_224", 5.96e6, 1.30e9),
        ("dependency_vit_small_patch16_224", 22.98e6, 4.76e9),
        ("dependency_vit_lite_tiny_patch16_224", 5.96e6, 0.85e9),
        ("dependency_vit_lite_small_patch16_224", 22.98e6, 3.14e9),
    ],
)
def test_published_sizes(name, parameters, macs):
    model = create_model(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = model(torch.zeros(1, 3, 224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.01)
    if "lite" in name:
        assert [kept.shape[1] for kept in found.kept] == [196, 196, *[164] * 3, *[132] * 3, *[100] * 3, 69]


def test_messages_are_loud_at_first():
    model = create_model(POCKET).eval()
    with torch.no_grad():
        found = model(torch.randn(2, 3, 64, 64))
    assert found.messages.min() > 0.8


@pytest.mark.parametrize("options", [{}, {"controller": False}, {"head_selector": False}, {"keep": 0.4}])
def test_columns_of_the_mask_are_what_tokens_send(options):
    with torch.no_grad():
        found = small(**options)(images(), output_attentions=True)
    for mask, messages, received in zip(found.attentions, found.layer_messages, found.received, strict=True):
        torch.testing.assert_close(mask.sum(1), messages)
        torch.testing.assert_close(mask.sum(2), received)
        torch.testing.assert_close(received.sum(1), messages.sum(1))


def test_messages_fade():
    with torch.no_grad():
        found = small()(images())
    for before, after in pairwise([torch.ones_like(found.messages), *found.layer_messages]):
        assert (after < before).all() and (after > 0).all()
    torch.testing.assert_close(found.messages, found.layer_messages[-1])


def test_a_control_is_a_plain_vit():
    model = small(attention="forward", head_selector=False, controller=False)
    layer = model.layers[0].attention
    x = torch.randn(2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out, messages, _, _ = layer(x, torch.ones(2, 16, dtype=torch.float64), False)
        query, key, value = layer.qkv(x).view(2, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(out, layer.proj(wanted.transpose(1, 2).flatten(2)))
    assert (messages == 1).all()
    assert not [name for name, _ in model.named_parameters() if "selector" in name or "controller" in name]


@pytest.mark.parametrize("prune_by", SCORES)
def test_keeping_all_is_not_pruning(prune_by):
    model, pictures = small(prune_by=prune_by), images()
    with torch.no_grad():
        whole, kept = model(pictures), small(prune_by=prune_by, prune_after=())(pictures)
    assert torch.equal(whole.last_hidden_state, kept.last_hidden_state)
    assert torch.equal(whole.indices, torch.arange(16).expand(2, -1))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.floats(0.05, 1), st.sampled_from(SCORES), st.integers(0, 99))
def test_indices_lead_back(batch, keep, prune_by, seed):
    """What is left lies where the indices say, in batches of images that keep different tokens."""
    model, pictures = small(seed=1, prune_by=prune_by), images(batch, seed=seed)
    with torch.no_grad():
        found = model(pictures, keep=keep, output_hidden_states=True)
    assert found.indices.shape[1] == counts(16, keep, 2)[-1]
    previous = torch.arange(16).expand(batch, -1)
    for kept, messages in zip((*found.kept, found.indices), (*found.layer_messages, found.messages), strict=True):
        assert (kept.diff(dim=1) > 0).all()
        for own, before in zip(kept.tolist(), previous.tolist(), strict=True):
            assert set(own) <= set(before)
        assert messages.shape == kept.shape
        previous = kept
    torch.testing.assert_close(found.messages, found.layer_messages[-1])
    if prune_by != "random":
        for image in range(batch):
            with torch.no_grad():
                alone = model(pictures[image : image + 1], keep=keep)
            assert torch.equal(alone.indices[0], found.indices[image])
            torch.testing.assert_close(alone.last_hidden_state[0], found.last_hidden_state[image])


def test_those_that_send_least_are_dropped():
    with torch.no_grad():
        found = small()(images(), keep=0.5)
    for image in range(2):
        first = dict(zip(found.kept[0][image].tolist(), found.layer_messages[0][image].tolist(), strict=True))
        left = set(found.kept[1][image].tolist())
        assert min(first[token] for token in left) >= max(first[token] for token in set(first) - left)


def test_gradients_are_those_without_checkpointing():
    model, pictures = small(keep=0.5).train(), images()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(pictures).pooler_output.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("chunk", [3, 16])
def test_chunks_change_nothing(chunk):
    with torch.no_grad():
        found, chunked = small()(images(), keep=0.5), small(chunk=chunk)(images(), keep=0.5)
    torch.testing.assert_close(chunked.last_hidden_state, found.last_hidden_state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_finite_and_exact_where_it_matters(dtype):
    model = small().to(dtype)
    with torch.no_grad():
        found = model(100 * images().to(dtype))
    assert found.last_hidden_state.isfinite().all()
    assert found.messages.dtype == torch.float32
    assert all(received.isfinite().all() for received in found.received)


def test_other_sizes_interpolate_positions():
    model = small()
    with torch.no_grad():
        found = model(images(size=48))
        wide = model(torch.randn(1, 3, 32, 64, dtype=torch.float64))
    assert found.last_hidden_state.shape == (2, 36, 16)
    assert wide.last_hidden_state.shape == (1, 32, 16)


def test_files_round_trip(tmp_path):
    model = create_model(POCKET, keep=0.4, prune_by="received").eval()
    model.save_pretrained(tmp_path)
    loaded = DependencyViTForImageClassification.from_pretrained(tmp_path).eval()
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        one, two = model(pictures), loaded(pictures)
    assert torch.equal(one.logits, two.logits) and torch.equal(one.indices, two.indices)
    assert loaded.config.prune_by == "received"
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is DependencyViTForImageClassification


def test_pipelines_of_transformers_take_a_folder(tmp_path):
    model = create_model(POCKET).eval()
    model.save_pretrained(tmp_path)
    processor = DependencyViTImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    picture = Image.new("L", (90, 50), 200)
    found = pipeline("image-classification", model=str(tmp_path), top_k=9)(picture)
    with torch.no_grad():
        expected = model(processor(picture, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]
    scores = {one["label"]: one["score"] for one in found}
    torch.testing.assert_close(torch.tensor([scores[f"LABEL_{n}"] for n in range(9)]), expected)


def test_masked_images_learn_to_be_painted():
    torch.manual_seed(0)
    model = DependencyViTForMaskedImageModeling(DependencyViTConfig(**SMALL))
    pictures = images().float()
    masked = torch.rand(2, 16) < 0.5
    loss = model(pictures, masked).loss
    loss.backward()
    assert model.mask_token.grad.abs().sum() > 0
    hidden = pictures.clone()  # what is hidden is not seen
    for token in masked[0].nonzero().flatten().tolist():
        row, column = divmod(token, 4)
        hidden[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 7
    torch.testing.assert_close(model(hidden, masked).logits, model(pictures, masked).logits)


def test_a_classifier_learns():
    torch.manual_seed(0)
    model = create_model(POCKET, num_hidden_layers=2, prune_after=(1,), keep=0.5)
    pictures, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(pictures, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 30}, "multiple of patch_size"),
        ({"hidden_size": 15}, "multiple of num_attention_heads"),
        ({"attention": "causal"}, "choose reversed or forward"),
        ({"prune_by": "luck"}, "choose one of"),
        ({"keep": 0.0}, "cannot be kept"),
        ({"keep": 1.5}, "cannot be kept"),
        ({"is_decoder": True}, "no order"),
        ({"is_causal": True}, "no order"),
        ({"prune_after": (1, 4)}, "prune_after"),
        ({"selector_temperature": 0.0}, "selector_temperature"),
    ],
)
def test_configurations_that_do_not_fit(options, words):
    with pytest.raises(SpringtideError, match=words):
        DependencyViTConfig(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_mask": torch.ones(4, 4).tril()}, "attention mask"),
        ({"past_key_values": object()}, "KV cache"),
        ({"use_cache": True}, "KV cache"),
        ({"keep": -1.0}, "cannot be kept"),
    ],
)
def test_what_only_an_order_of_tokens_has_is_refused(options, words):
    model = create_model(POCKET)
    with pytest.raises(SpringtideError, match=words):
        model(torch.zeros(1, 3, 64, 64), **options)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 60, 64), "60 x 64"),
        ((1, 1, 64, 64), r"\[batch, 3"),
        ((3, 64, 64), r"\[batch, 3"),
        ((1, 3, 0, 64), "0 x"),
    ],
)
def test_images_that_cannot_be_cut(shape, words):
    with pytest.raises(SpringtideError, match=words):
        create_model(POCKET)(torch.zeros(shape))


def test_unknown_models_are_named():
    with pytest.raises(SpringtideError, match=POCKET):
        create_model("dependency_vit_huge")
    assert len(MODELS) == 6
