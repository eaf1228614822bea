"""Whatever a file holds, it gives an RGB picture or one sentence; data gives each picture once before any again."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from springtide.errors import SpringtideError
from springtide.vision import images
from springtide.vision.images import DependencyViTImageProcessor, ImageFolder, digits, read_image
from springtide.vision.scenes import Scenes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def picture(width=12, height=9, seed=0):
    """Colours that change from left to right and from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, seed % 256)], axis=-1).astype(np.uint8))


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def written(path, image, **options):
    image.save(path, **options)
    return path


# -- one image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_of_file_is_read(tmp_path, kind):
    (tmp_path / "image").write_bytes(encoded(picture(), kind))
    found = read_image(tmp_path / "image")
    assert found.mode == "RGB" and found.size == (12, 9)
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(picture(), dtype=int)).mean() < 20


def test_gray_palettes_and_bits_are_converted(tmp_path):
    gray = picture().convert("L")
    for name, image in {"gray": gray, "palette": gray.convert("P"), "alpha": gray.convert("LA")}.items():
        assert np.array_equal(read_image(written(tmp_path / f"{name}.png", image)), gray.convert("RGB"))
    black_and_white = gray.convert("1")
    found = read_image(written(tmp_path / "bits.png", black_and_white))
    assert np.array_equal(found, black_and_white.convert("RGB"))


def test_what_is_transparent_is_white(tmp_path):
    image = picture(4, 1).convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[0, 255, 0, 255]], dtype=np.uint8)))
    pixels = np.asarray(read_image(written(tmp_path / "a.png", image)))
    assert (pixels[0, [0, 2]] == 255).all()
    assert np.array_equal(pixels[0, [1, 3]], np.asarray(picture(4, 1))[0, [1, 3]])
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    palette.putpixel((0, 0), 0)
    pixels = np.asarray(read_image(written(tmp_path / "p.png", palette, transparency=0)))
    assert pixels.tolist() == [[[255, 255, 255], [9, 99, 199]]]


def test_cmyk_is_converted(tmp_path):
    red = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    pixels = np.asarray(read_image(written(tmp_path / "a.jpg", red, quality=95)), dtype=int)
    assert np.abs(pixels - [255, 0, 0]).max() < 10


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bits_become_8(tmp_path, name):
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    pixels = np.asarray(read_image(written(tmp_path / name, Image.fromarray(levels))))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("pixels", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_pixels_of_unknown_range(tmp_path, pixels):
    path = written(tmp_path / "a.tiff", Image.fromarray(pixels))
    with pytest.raises(SpringtideError, match=r"a.tiff' has pixels that are no numbers of 8 or 16 bits; convert it"):
        read_image(path)


@pytest.mark.parametrize("kind", ["a.jpg", "a.png", "a.tiff", "a.webp"])
def test_images_are_upright(tmp_path, kind):
    """EXIF's orientation 6: the top of the picture is the right side of the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = read_image(written(tmp_path / kind, picture(40, 20), exif=exif))
    assert found.size == (20, 40)
    expected = np.asarray(picture(40, 20).transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(np.asarray(found, dtype=int) - expected).mean() < 20


def test_large_jpeg_is_decoded_at_a_fraction(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jpg", picture(400, 200))
    monkeypatch.setattr(images, "MOST_PIXELS", 400 * 200)
    assert read_image(path).size == (400, 200)
    for limit, size in ((79_999, (200, 100)), (20_000, (200, 100)), (5_000, (100, 50)), (1_250, (50, 25))):
        monkeypatch.setattr(images, "MOST_PIXELS", limit)
        assert read_image(path).size == size
    monkeypatch.setattr(images, "MOST_PIXELS", 1_000)
    with pytest.raises(SpringtideError, match="more pixels than can be read"):
        read_image(path)


@pytest.mark.parametrize("limit", [images.MOST_PIXELS, Image.MAX_IMAGE_PIXELS, 2 * Image.MAX_IMAGE_PIXELS])
def test_images_too_large_are_not_decoded(tmp_path, monkeypatch, recwarn, limit):
    path = written(tmp_path / "a.png", Image.new("1", (limit // 10_000 + 1, 10_000)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(
        SpringtideError, match=r"a.png' has more pixels than can be read, 40 million \(JPEG: 179\); scale it"
    ):
        read_image(path)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"image' cannot be read \(No such file or directory\); check the path"),
        (b"", r"image' is no image, or damaged; give one of PNG, JPEG"),
        (b"Hello", r"image' is no image, or damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image' is no image"),
        (encoded(picture(), "PNG")[:-40], r"image' is damaged or cut short; get it anew"),
        (encoded(picture(), "JPEG")[:-40], r"image' is damaged or cut short; get it anew"),
    ],
)
def test_files_that_are_no_images(tmp_path, content, message):
    if content is not None:
        (tmp_path / "image").write_bytes(content)
    with pytest.raises(SpringtideError, match=message):
        read_image(tmp_path / "image")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(SpringtideError, match=r"cannot be read \(Is a directory\)"):
        read_image(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(SpringtideError, match=r"cannot be read \(Permission denied\); check the path"):
        read_image(tmp_path / "a.png")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FORMATS),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_broken_files_give_a_picture_or_a_sentence(tmp_path, kind, length, changes):
    content = bytearray(encoded(picture(), kind))
    for place, value in changes:
        content[int(place * len(content))] = value
    (tmp_path / "image").write_bytes(content[: round(length * len(content))])
    with suppress(SpringtideError):
        assert read_image(tmp_path / "image").mode == "RGB"


# -- processor -----------------------------------------------------------------------------------------------------


def processor(size):
    return DependencyViTImageProcessor(size={"height": size, "width": size})


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16"]), *2 * [st.integers(1, 70)]),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([16, 32]),
)
def test_any_pictures_become_pixel_values(kinds, size):
    pixels = processor(size)([Image.new(*kind[:1], kind[1:]) for kind in kinds], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (len(kinds), 3, size, size) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_pixel_values_are_normalised():
    pixels = processor(8)(Image.new("RGB", (30, 20), (0, 51, 255)), return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, torch.tensor([-1, -0.6, 1]).view(1, 3, 1, 1).expand(1, 3, 8, 8), atol=1e-6)
    transparent = processor(8)(Image.new("RGBA", (5, 5), (0, 0, 0, 0)), return_tensors="pt")["pixel_values"]
    assert (transparent == 1).all()
    deep = Image.fromarray(np.full((9, 9), 51 * 256, dtype=np.uint16))
    assert torch.allclose(processor(8)(deep, return_tensors="pt")["pixel_values"], torch.tensor(-0.6), atol=1e-6)
    assert DependencyViTImageProcessor().size["height"] == 224


def test_arrays_are_as_good_as_pictures():
    array = np.asarray(picture(8, 8))
    both = processor(8)([picture(8, 8), array], return_tensors="pt")["pixel_values"]
    assert torch.equal(both[0], both[1])


def test_a_scene_is_what_the_processor_makes_of_its_picture(tmp_path):
    found = Scenes(64).held_out(1)[0]
    pixels = ((found[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = read_image(written(tmp_path / "a.png", Image.fromarray(pixels)))
    assert torch.allclose(processor(64)(image, return_tensors="pt")["pixel_values"], found, atol=1e-6)


def test_a_processor_is_saved_and_loaded(tmp_path):
    processor(48).save_pretrained(tmp_path)
    loaded = DependencyViTImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor(48).to_dict()
    both = [made(picture(), return_tensors="pt")["pixel_values"] for made in (loaded, processor(48))]
    assert torch.equal(*both)


# -- data ----------------------------------------------------------------------------------------------------------


def folder(path: Path, **counts: int) -> Path:
    """Images for each class, told apart by their blue; and files that are none."""
    for start, (name, count) in zip(range(0, 1000, 20), counts.items(), strict=False):
        (path / name).mkdir(parents=True)
        for number in range(count):
            written(path / name / f"{number:02}.png", Image.new("RGB", (9, 9), (0, 0, start + number)))
        (path / name / "notes.txt").write_text("no image")
        (path / name / ".hidden.png").write_text("no image")
    (path / ".git").mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text("no folder")
    return path


def blues(pixels):
    """Which images, in the order of :func:`folder`, these are."""
    return ((pixels[:, 2, 0, 0] + 1) * 127.5).round().long().tolist()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(2, 19), min_size=1, max_size=3), st.integers(0, 3))
def test_a_part_of_each_class_is_held_out(tmp_path_factory, counts, seed):
    path = folder(tmp_path_factory.mktemp("data"), **{f"c{label}": count for label, count in enumerate(counts)})
    data = ImageFolder(path, 8, seed)
    assert data.classes == [f"c{label}" for label in range(len(counts))]
    pixels, labels = data.held_out(100)
    held = blues(pixels)
    everything = {20 * label + number: label for label, count in enumerate(counts) for number in range(count)}
    assert labels.tolist() == [everything[item] for item in held]
    assert [labels.tolist().count(label) for label in range(len(counts))] == [max(1, round(0.1 * n)) for n in counts]
    trained = len(everything) - len(held)
    pixels, labels = data.batch(0, trained, seed=7)
    assert pixels.shape == (trained, 3, 8, 8) and labels.dtype == torch.int64
    assert sorted(blues(pixels) + held) == sorted(everything)
    assert labels.tolist() == [everything[item] for item in blues(pixels)]
    again = ImageFolder(path, 8, seed)
    assert again.digest == data.digest and blues(again.held_out(100)[0]) == held


def test_every_image_comes_once_before_any_comes_again(tmp_path):
    data = ImageFolder(folder(tmp_path, cats=6, dogs=6), 8)  # ten to train on
    drawn = [item for step in range(5) for item in blues(data.batch(step, 4, seed=3)[0])]
    first, second = drawn[:10], drawn[10:]
    assert len(set(first)) == 10 and sorted(first) == sorted(second) and first != second
    assert torch.equal(data.batch(3, 4, seed=3)[0], data.batch(3, 4, seed=3)[0])
    assert blues(data.batch(0, 10, seed=3)[0]) != blues(data.batch(0, 10, seed=4)[0])
    assert data.batch(0, 25, seed=3)[0].shape == (25, 3, 8, 8)
    assert len(data.held_out(1)[1]) == 1


def test_digests_tell_data_apart(tmp_path):
    path = folder(tmp_path, cats=3, dogs=3)
    digests = {ImageFolder(path, 8).digest, ImageFolder(path, 16).digest, ImageFolder(path, 8, seed=1).digest}
    os.rename(path / "cats" / "00.png", path / "cats" / "09.png")
    digests.add(ImageFolder(path, 8).digest)
    os.rename(path / "cats", path / "bats")
    digests.add(ImageFolder(path, 8).digest)
    assert len(digests | {Scenes(8).digest, Scenes(16).digest}) == 7


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, r"data' cannot be read \(No such file or directory\); give a folder that has one of images for each"),
        ({}, r"data' has no sub-folders; put the images of each class into one, named after it"),
        ({"cats": 2, "dogs": 0}, r"data/dogs' holds no images \(.png, .jpg,.*\); add some, or remove the folder"),
        ({"cats": 2, "dogs": 1}, r"data/dogs' holds one image, which cannot be both trained on and held out; add an"),
    ],
)
def test_folders_that_are_no_data(tmp_path, counts, message):
    if counts is not None:
        folder(tmp_path / "data", **counts)
    with pytest.raises(SpringtideError, match=message):
        ImageFolder(tmp_path / "data", 8)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(SpringtideError, match=r"data' cannot be read \(Not a directory\); give a folder"):
        ImageFolder(tmp_path / "data", 8)


def test_a_broken_file_is_named_once_it_is_needed(tmp_path):
    data = ImageFolder(folder(tmp_path, cats=2), 8)
    for name in ("00", "01"):
        (tmp_path / "cats" / f"{name}.png").write_bytes(encoded(picture(), "PNG")[:-40])
    with pytest.raises(SpringtideError, match=r"cats/0[01].png' is damaged or cut short"):
        data.batch(0, 1, seed=0)
    with pytest.raises(SpringtideError, match=r"cats/0[01].png' is damaged or cut short"):
        data.held_out(1)


def test_digits():
    pytest.importorskip("sklearn")
    data = digits(32)
    assert data.classes == list("0123456789")
    pixels, labels = data.held_out(10_000)
    assert pixels.shape == (len(labels), 3, 32, 32) and 170 < len(labels) < 190
    assert pixels.min() == -1 and pixels.max() == 1 and torch.equal(pixels[:, 0], pixels[:, 2])
    assert data.batch(5, 7, seed=0)[0].shape == (7, 3, 32, 32)
    assert data.digest != digits(16).digest


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SpringtideError, match=r"run `pip install 'springtide\[vision\]'`"):
        digits(32)
