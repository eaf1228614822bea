"""The page is a whole PNG or none, and shows what was kept."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from springtide.errors import SpringtideError
from springtide.vision import page
from springtide.vision.dependency_vit import create_model
from springtide.vision.page import draw_page
from springtide.vision.tree import Grid, layers, look, partitions, saliencies, trees

OPTIONS = {"image_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def found(keep=1.0, prune_after=(1, 2), size=(32, 32), k=3):
    """What a page is drawn of."""
    torch.manual_seed(0)
    model = create_model("dependency_vit_pocket_patch8_64", prune_after=prune_after, **OPTIONS)
    pixels = torch.randn(1, 3, *size)
    output, grid = look(model, pixels, keep), Grid.of(pixels, 8)
    salient = saliencies(output, grid)
    return output, trees(output, grid.tokens)[0], salient[0], partitions(output, salient, k)[0]


def texts(figure):
    """All that is written on a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda one: hasattr(one, "get_text")))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    figures = []

    class Kept(page.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(page, "Figure", Kept)
    return figures


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (8, 8)])
def test_a_page_is_an_image(tmp_path, size):
    image = Image.new("RGB", (3 * size[1], 5 * size[0]), "orange")
    draw_page(tmp_path / "page.png", image, *found(size=size))
    with Image.open(tmp_path / "page.png") as written:
        written.load()
        assert written.format == "PNG"
        assert len(set(written.convert("L").resize((200, 200)).tobytes())) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]
    assert image.size == (3 * size[1], 5 * size[0])


def test_a_page_says_what_was_kept(tmp_path, drawn):
    draw_page(tmp_path / "a.png", Image.new("RGB", (32, 32)), *found(), {"prediction": "a disc"})
    assert "Nothing pruned: all 16 tokens went through all 3 layers" in texts(drawn[0])
    assert "a disc" in texts(drawn[0]) and "4 x 4, of 8 x 8 pixels" in texts(drawn[0])
    draw_page(tmp_path / "b.png", Image.new("RGB", (32, 32)), *found(0.5))
    for title in ("layer 1: 16 tokens", "layer 2: 12 tokens", "layer 3: 8 tokens"):
        assert title in texts(drawn[1])
    assert "Nothing pruned" not in texts(drawn[1])


def test_stages_of_pruning():
    output = found(0.5, prune_after=(2, 3))[0]
    titles, kept = zip(*page._stages(layers(output, 16)[0], 3), strict=True)
    assert titles == ("layers 1 to 2: 16 tokens", "layer 3: 12 tokens", "at the end: 8 tokens")
    assert kept[1].nonzero().squeeze(1).equal(output.kept[2][0])
    assert kept[2].nonzero().squeeze(1).equal(output.indices[0])


def test_a_page_of_many_parts_and_stages(tmp_path):
    output = found(0.3, prune_after=(1, 2, 3), size=(64, 64), k=20)
    draw_page(tmp_path / "page.png", Image.new("RGB", (2000, 10)), *output)
    assert (tmp_path / "page.png").exists()


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.png"
    path.write_bytes(b"before")

    def fails(figure, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.Figure, "savefig", fails)
    with pytest.raises(SpringtideError, match=r"page.png' cannot be written \(No space left on device\)"):
        draw_page(path, Image.new("RGB", (32, 32)), *found())
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(SpringtideError, match=r"nowhere/page\.png' cannot be written"):
        draw_page(tmp_path / "nowhere" / "page.png", Image.new("RGB", (32, 32)), *found())
