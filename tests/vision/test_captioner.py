"""The captioner: what is trained in one pass is what the engine decodes, with all image tokens or with some."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from springtide.attention import parse_policy
from springtide.cli import app
from springtide.errors import SpringtideError
from springtide.rows.sampling import Sampling
from springtide.vision.captioner import PROJECTOR, VISION, Captioner
from springtide.vision.dependency_vit import (
    DependencyViTConfig,
    DependencyViTForImageClassification,
    DependencyViTForMaskedImageModeling,
    DependencyViTModel,
)
from springtide.vision.evaluation.captioner import evaluate
from springtide.vision.scenes import Scenes, questions, scenes
from springtide.vision.training.captioner import (
    CaptionerObjective,
    Exchanges,
    new_tokenizer,
    tree_mask,
)

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "prune_after": (1,),
}


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    data = Exchanges(new_tokenizer(), Scenes(32))
    made = CaptionerObjective(DependencyViTModel(DependencyViTConfig(**SMALL)), data, layers=3)
    with torch.no_grad():
        for module in (made.vit, made.model, made.projector):
            for parameter in module.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def folder(objective, tmp_path_factory):
    path = tmp_path_factory.mktemp("captioner") / "saved"
    objective.save(path)
    return path


def test_captions_say_everything():
    batch = scenes(torch.arange(3), seed=1)
    for i in range(3):
        *single, caption = questions(batch, i)
        assert all(question.answer in caption.answer.split() for question in single)


def test_every_word_has_a_token():
    tokenizer = new_tokenizer()
    batch = scenes(torch.arange(500, 520), seed=9)
    for i in range(20):
        for text in sum(((question.text, question.answer) for question in questions(batch, i)), ()):
            tokens = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in tokens
            assert tokenizer.decode(tokens).replace(" ?", "?") == text


def test_exchanges_see_the_image_and_themselves():
    seen = tree_mask(2, [2, 1])[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_what_is_trained_is_what_is_decoded(objective, keep):
    """The most probable tokens in the one pass of training are those that the engine finds, question by question."""
    batch = scenes(torch.arange(4), seed=2, size=32)
    tokens = objective.data.tokens(batch)
    captioner = objective.captioner
    with torch.no_grad():
        _, right = objective._answer(batch.images, tokens, keep)
    answers = objective._answers
    for i in range(4):
        embeds = captioner.embeds(batch.images[i : i + 1], keep)
        start, place = 0, 0
        for question, answer in objective.data.lengths:
            own = tokens[i, start : start + question + answer].tolist()
            for given in range(answer):
                assert answers[place] == start + question + given
                prompt = [0] * len(embeds) + own[: question + given]
                sequence = captioner.engine.start(prompt, Sampling(max_tokens=1), embeds=embeds)
                list(captioner.engine.run([sequence]))
                assert (sequence.output == [own[question + given]]) == bool(right[i, place])
                place += 1
            start += question + answer


def test_image_tokens_keep_their_positions(objective):
    batch = scenes(torch.arange(1), seed=2, size=32)
    captioner = objective.captioner
    whole, pruned = captioner.embeds(batch.images), captioner.embeds(batch.images, 0.4)
    assert whole.positions == tuple(range(16)) and len(pruned) == 6
    assert whole.end == pruned.end == 16
    with torch.no_grad():
        assert pruned.positions == tuple(captioner.vit(batch.images, keep=0.4).indices[0].tolist())


def test_it_learns():
    torch.manual_seed(0)
    made = CaptionerObjective(
        DependencyViTModel(DependencyViTConfig(**SMALL)), Exchanges(new_tokenizer(), Scenes(32)), layers=1
    )
    optimizer = torch.optim.AdamW(made.parameter_groups(), lr=5e-3)
    losses = []
    for step in range(12):
        loss, metrics = made.loss(*made.data.batch(step, 16, seed=0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and 0 < metrics["top1"] <= 1
    held_out = scenes(-1 - torch.arange(4), 0, 32)
    made.calibrate(held_out.images, made.data.tokens(held_out))
    assert {len(shares) for shares in made.accuracy.values()} == {6}
    assert "how many limbs are there?" in made.accuracy["0.36"]


def test_files_round_trip(objective, folder):
    loaded, batch = Captioner.load(folder, dtype="float32"), scenes(torch.arange(2), seed=3, size=32)
    with torch.no_grad():
        before, after = (own.embeds(batch.images[:1], 0.5) for own in (objective.captioner, loaded))
    assert after.positions == before.positions
    torch.testing.assert_close(after.vectors, before.vectors, rtol=0.05, atol=0.05)  # bf16 on disk
    assert not list(folder.parent.glob("*.writing"))
    output = loaded.ask(
        batch.images[0].permute(1, 2, 0).mul(127.5).add(127.5).byte().numpy(), "describe the picture", max_tokens=5
    )
    assert 0 < len(output.token_ids) <= 5 and output.stats.prompt_tokens == 19


def test_drafted_is_plain_on_the_same_tokens(folder):
    captioner = Captioner.load(folder, dtype="float32")
    policies = [parse_policy("dense"), parse_policy("tidal:budget=64,layout=paper")]
    rows = list(evaluate(captioner, scenes(torch.arange(3), 5, 32), [1.0, 0.4], policies))
    assert [row["image_tokens"] for row in rows] == [16, 6, 16, 6]
    for row in rows:
        assert row["outputs_equal"] == row["outputs"] == 18
        assert (
            row["prompt_kv_bytes"] == row["prompt_tokens"] * 3 * 2 * 2 * 32 * 4
        )  # layers, keys and values, heads, numbers, bytes
    assert rows[0]["questions"] == rows[2]["questions"]  # the budget covers everything


def test_words_that_it_lacks_are_refused(folder):
    captioner = Captioner.load(folder)
    embeds = captioner.embeds(torch.zeros(1, 3, 32, 32))
    with pytest.raises(SpringtideError, match=r"knows these words only: .*head.*limbs"):
        captioner.start(embeds, "what colour is the sky", Sampling())


def test_folders_that_hold_none(folder, tmp_path):
    with pytest.raises(SpringtideError, match="no captioner's folder"):
        Captioner.load(tmp_path)
    with pytest.raises(SpringtideError, match="no captioner's folder"):
        Captioner.load(folder / VISION)


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_broken_projector(folder, tmp_path, content):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / PROJECTOR).write_bytes(content)
    with pytest.raises(SpringtideError, match="broken, or of another size"):
        Captioner.load(tmp_path / "copy")


def test_the_bundled_one_sees(tmp_path):
    """Some of its answers about a scene that no training has seen, from all image tokens and from a third of them."""
    captioner = Captioner.load("pocket")
    rows = list(evaluate(captioner, Scenes().held_out_scenes(6), [1.0, 0.36], [parse_policy("dense")]))
    for row in rows:
        assert row["foreground"] > 0.8 and row["outputs_equal"] == row["outputs"]
    assert rows[1]["image_tokens"] == 23 and rows[1]["prompt_kv_bytes"] < rows[0]["prompt_kv_bytes"]


def test_see_on_the_command_line(tmp_path):
    picture, page, figures = tmp_path / "scene.png", tmp_path / "page.png", tmp_path / "see.json"
    pixels = ((Scenes().held_out_scenes(1).images[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).save(picture)
    command = ["see", str(picture), "--keep", "0.36", "--out", str(page), "--json", str(figures), "--draft", "lookup"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and " head and " in result.stdout
    assert json.loads(figures.read_text())["text"] == result.stdout.strip()
    assert Image.open(page).size[0] > 1000


@pytest.mark.parametrize("kind", [DependencyViTForImageClassification, DependencyViTForMaskedImageModeling])
def test_see_with_a_vision_model_alone(tmp_path, kind):
    kind(DependencyViTConfig(**{**SMALL, "id2label": {0: "cat", 1: "dog"}})).save_pretrained(tmp_path / "vit")
    Image.new("L", (30, 20)).save(tmp_path / "photo.png")
    paths = ["--out", str(tmp_path / "page.png"), "--json", str(tmp_path / "see.json")]
    command = ["see", str(tmp_path / "photo.png"), "--model", str(tmp_path / "vit"), "--keep", "0.5", *paths]
    result = CliRunner().invoke(app, command)
    found = json.loads((tmp_path / "see.json").read_text())
    assert result.exit_code == 0 and found["image_tokens"] == 8
    assert result.stdout.strip() == found.get("text", "")
    assert (found.get("text") in ("cat", "dog")) == (kind is DependencyViTForImageClassification)
    assert Image.open(tmp_path / "page.png").size[0] > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere.png"], "cannot be read"),
        (["scene.png", "--keep", "0"], "cannot be kept"),
        (["scene.png", "--question", "why?"], "knows these words only"),
        (["scene.png", "--model", "."], "no captioner's folder"),
        (["scene.png", "--question", " "], "There is no question"),
        (["scene.png", "--json", "scene.png"], "'scene.png' is the image itself"),
        (["scene.png", "--json", "page.png"], "'page.png' is named twice"),
        (["scene.png", "--model", "vit", "--draft", "lookup"], "'vit' holds no captioner, so it answers nothing"),
    ],
)
def test_see_refuses(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (30, 20)).save("scene.png")
    Path("vit").mkdir()
    Path("vit/config.json").write_text("{}")
    result = CliRunner().invoke(app, ["see", *options, "--out", "page.png"])
    assert words in str(result.exception) and not (tmp_path / "page.png").exists()
