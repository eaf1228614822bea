"""Images from files: one at a time, as tensors for a model, and as data to train on."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_processing_backends import PilBackend

from springtide.errors import SpringtideError

MOST_PIXELS = 40_000_000  # of an image in memory: 160 MB, and up to three times that while it is converted
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others can run programs, or hold no image
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
HELD_OUT = 0.1  # share of each class


class UnknownRange(ValueError):
    """Pixels of which nobody knows what is black and what is white."""


def read_image(path: Path) -> Image.Image:
    """The picture in a file, upright and in RGB; the first one of several.

    What is transparent becomes white, and 16 bits become 8. JPEG of more than 40 million pixels, up to the 179 million
    that Pillow opens, is decoded at a half, a quarter or an eighth of its width and height.

    Raises SpringtideError for a file that is missing, damaged, cut short, no image or too large.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            shrink = next((by for by in (1, 2, 4) if width * height <= by**2 * MOST_PIXELS), 8)
            image.draft(None, (width // shrink, height // shrink))  # of JPEG alone
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Image.DecompressionBombError:
        reason = f"has more pixels than can be read, {MOST_PIXELS // 10**6} million (JPEG: 179); scale it down"
    except UnknownRange:
        reason = "has pixels that are no numbers of 8 or 16 bits; convert it to PNG"
    except UnidentifiedImageError:
        reason = f"is no image, or damaged; give one of {', '.join(FORMATS)}"
    except Exception as error:  # decoders raise whatever they run into
        system = error.strerror if isinstance(error, OSError) else None
        reason = f"cannot be read ({system}); check the path" if system else "is damaged or cut short; get it anew"
    raise SpringtideError(f"'{path}' {reason}.")


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, on white; raises UnknownRange for fractions and for more than 16 bits."""
    if image.mode == "F":
        raise UnknownRange
    if image.mode.startswith("I"):  # Pillow would take all from 255 as white
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() >= 2**16:
            raise UnknownRange
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


class DependencyViTImageProcessor(PilBackend):  # type: ignore[misc]
    """Pictures as ``pixel_values [B, 3, H, W]`` float32: in RGB, scaled to ``size``, and from -1 to 1.

    ``processor(images, return_tensors="pt")`` takes a picture or a list, of any mode and size; ``save_pretrained`` and
    ``from_pretrained`` are as in transformers.
    """

    resample = Image.Resampling.BILINEAR
    size: ClassVar[dict[str, int]] = {"height": 224, "width": 224}
    image_mean: ClassVar[list[float]] = [0.5, 0.5, 0.5]
    image_std: ClassVar[list[float]] = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True

    @classmethod
    def square(cls, side: int) -> Self:
        """One that scales to ``side`` by ``side`` pixels."""
        return cls(size={"height": side, "width": side})

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """A picture or an array of one, as an array of three channels."""
        if isinstance(image, Image.Image):
            return np.asarray(_rgb(image))
        return super().convert_to_rgb(image, input_data_format)


# -- data -----------------------------------------------------------------------------------------------------------


class LabelledData(Protocol):
    """What a model is trained on and measured with: images ``[B, 3, H, W]`` float32, -1 to 1, labels ``[B]`` int64.

    ``digest`` tells data apart; labels are places in ``classes``.
    """

    @property
    def classes(self) -> list[str]: ...
    @property
    def digest(self) -> str: ...

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """``size`` images of a step; each comes once, in an order that the seed decides, before any comes again."""
        ...

    def held_out(self, limit: int) -> tuple[Tensor, Tensor]:
        """Up to ``limit`` images, always the same ones, that no batch holds."""
        ...


class LabelledImages:
    """:class:`LabelledData` of a number of pictures, of which a tenth of each class, one at least, is held out.

    Args:
        labels: [N] int64; each class has two or more.
        read: gives picture ``n``; called whenever it is needed, so that memory holds a batch.
        image_size: pixels of a side, to which all are scaled.
        digest: of the pictures.
        seed: decides which are held out.
    """

    def __init__(
        self,
        classes: list[str],
        labels: Sequence[int],
        read: Callable[[int], Image.Image],
        image_size: int,
        digest: str,
        seed: int = 0,
    ) -> None:
        self.classes, self.labels, self.read = classes, torch.tensor(labels), read
        self.digest = f"{digest}-{image_size}-{seed}"
        self.processor = DependencyViTImageProcessor.square(image_size)
        held = []
        for label in range(len(classes)):
            own = (self.labels == label).nonzero()[:, 0]
            count = max(1, round(HELD_OUT * len(own)))
            held.append(own[_order(len(own), seed, label)[:count]])
        found = torch.cat(held)
        self.held = found[_order(len(found), seed, len(classes))]
        self.trained = torch.ones_like(self.labels).index_fill(0, found, 0).nonzero()[:, 0]

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """See :meth:`LabelledData.batch`; raises SpringtideError for a file that cannot be read."""
        places = [divmod(place, len(self.trained)) for place in range(step * size, (step + 1) * size)]
        orders = {epoch: _order(len(self.trained), seed, epoch) for epoch, _ in places}
        return self._load(torch.stack([self.trained[orders[epoch][place]] for epoch, place in places]))

    def held_out(self, limit: int) -> tuple[Tensor, Tensor]:
        """See :meth:`LabelledData.held_out`; raises SpringtideError for a file that cannot be read."""
        return self._load(self.held[:limit])

    def _load(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        pixels = [self.processor(self.read(n), return_tensors="pt")["pixel_values"] for n in numbers.tolist()]
        return torch.cat(pixels), self.labels[numbers]


def _order(count: int, *seeds: int) -> Tensor:
    """A random order of ``range(count)``."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(hash(seeds) & (2**63 - 1)))


class ImageFolder(LabelledImages):
    """The images in the sub-folders of a folder, each of which is a class.

    Raises SpringtideError for a folder without sub-folders, and for a class of fewer than two images.
    """

    def __init__(self, path: Path, image_size: int, seed: int = 0) -> None:
        folders = [folder for folder in _listed(path) if folder.is_dir()]
        if not folders:
            raise SpringtideError(
                f"'{path}' has no sub-folders; put the images of each class into one, named after it."
            )
        files = []
        for folder in folders:
            own = [file for file in _listed(folder) if file.suffix.lower() in SUFFIXES]
            if not own:
                kinds = ", ".join(SUFFIXES)
                raise SpringtideError(f"'{folder}' holds no images ({kinds}); add some, or remove the folder.")
            if len(own) == 1:
                raise SpringtideError(
                    f"'{folder}' holds one image, which cannot be both trained on and held out; "
                    "add another, or remove the folder."
                )
            files += own
        names = [folder.name for folder in folders]
        labels = [names.index(file.parent.name) for file in files]
        listing = "\n".join(str(file.relative_to(path)) for file in files)  # a repaired file makes no other data
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        super().__init__(names, labels, lambda number: read_image(files[number]), image_size, digest, seed)


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, by name, but for what is hidden; raises SpringtideError if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise SpringtideError(
            f"'{folder}' cannot be read ({error.strerror}); give a folder that has one of images for each class."
        ) from None


def digits(image_size: int, seed: int = 0) -> LabelledImages:
    """1,797 handwritten digits of 8 x 8 pixels, scaled up; raises SpringtideError if scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SpringtideError(
            "The digits come with the package scikit-learn; run `pip install 'springtide[vision]'`."
        ) from None
    data = load_digits()
    pictures = (data.images * (255 / 16)).round().astype(np.uint8)
    names = [str(name) for name in data.target_names]
    return LabelledImages(names, data.target, lambda n: Image.fromarray(pictures[n]), image_size, "digits", seed)
