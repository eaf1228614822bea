"""Scenes made on the fly: an object among distractors on a textured background, with exact masks and facts to ask for.

The object is a body with a head on top and limbs. Its class is the shapes of body and head. Neither colours nor edges
give it away: distractors share both with it, but nothing is attached to them.
"""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import cos, pi, prod, radians, sin, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SHAPES = ("disc", "square", "triangle")
TEXTURES = ("stripes", "checks", "dots", "gradient", "noise")
NUMBERS = ("one", "two", "three", "four")  # of limbs, and of distractors
MOST = len(NUMBERS)
BACKGROUND, BODY, HEAD, LIMBS = range(4)  # in ``SceneBatch.parts``
PAINTED = (*MOST * [BACKGROUND], *MOST * [LIMBS], BODY, HEAD)  # one over the other

SIDE, INRADIUS = sqrt(pi) / 2, sqrt(pi / 27**0.5)  # half the square's side, the triangle's: their areas are the disc's
_DISC = [(cos(pi * k / 4), sin(pi * k / 4)) for k in range(8)]
_SQUARE = [(SIDE * x, SIDE * y) for x, y in product((-1, 1), repeat=2)]
_TRIANGLE = [(INRADIUS * x, INRADIUS * y) for x, y in ((0, -2), (sqrt(3), 1), (-sqrt(3), 1), (0, 1))]
OUTLINES = torch.tensor([_DISC, 2 * _SQUARE, 2 * _TRIANGLE], dtype=torch.float64)  # points [3, 8, 2] of each shape

# Of an object, in radii of its body; angles in degrees.
HEAD_RADIUS = (0.7, 0.8)
OVERLAP = 0.2  # of head and body
LIMB_REACH, LIMB_HIDDEN, LIMB_WIDTH = 1.6, 0.5, 0.2  # from the body's middle; below the body; half of it
LIMB_ANGLES, LIMB_SWING = (60, 120, -8, 188), 12  # legs and arms, from the right downwards; to either side
TILT = 30  # to either side

# In sides of the image.
BODY_RADIUS, DISTRACTOR_RADIUS = (0.145, 0.225), (0.055, 0.1)
BARS, BAR_STRETCH = 0.4, 2.5  # share of the square distractors that are bars; their length, in widths
GAP = 0.03  # beside a distractor
BORDER = 0.022  # of all shapes, black
CELLS = 16  # of a noisy background, in a row

# Of colours, whose channels go from 0 to 1.
DARKEST = 0.35
CONTRAST = (0.1, 0.3)  # of the background's two, in each channel
NOISE = 0.04  # of each pixel, to either side
LIKE_BODY, LIKE_PART = 0.3, 0.5  # shares of heads and limbs that have the body's, of distractors that have a part's

TRIES, PALETTE = 24, 4  # places for a distractor and colours for a shape to choose the best from


@dataclass(frozen=True)
class SceneBatch:
    """``B`` scenes, and what is in them.

    Attributes:
        images: [B, 3, size, size] float32, -1 to 1 in 255 steps: what the image processor makes of the picture.
        parts: [B, size, size] uint8: 0 background and distractors, 1 body, 2 head, 3 limbs.
        body, head: [B] int64, which of ``SHAPES``.
        limbs, distractors: [B] int64, how many: 1 to 4.
        texture: [B] int64, which of ``TEXTURES`` the background has.
    """

    images: Tensor
    parts: Tensor
    body: Tensor
    head: Tensor
    limbs: Tensor
    texture: Tensor
    distractors: Tensor

    @property
    def labels(self) -> Tensor:
        """[B] int64, which of ``Scenes.classes``."""
        return self.body * len(SHAPES) + self.head

    @property
    def foreground(self) -> Tensor:
        """[B, size, size] bool: where the object is."""
        return self.parts != BACKGROUND


class Question(NamedTuple):
    """``kind`` says where to look; the answer is one word, that of a caption a sentence."""

    kind: Literal["foreground", "background", "caption"]
    text: str
    answer: str


def questions(batch: SceneBatch, i: int) -> list[Question]:
    """What can be asked about scene ``i``; the caption, which comes last, is all the answers."""
    body, head, texture = SHAPES[batch.body[i]], SHAPES[batch.head[i]], TEXTURES[batch.texture[i]]
    limbs, distractors = NUMBERS[batch.limbs[i] - 1], NUMBERS[batch.distractors[i] - 1]
    caption = f"a {body} with a {head} head and {limbs} limbs on {texture} with {distractors} distractors"
    return [
        Question("foreground", "what shape is the head?", head),
        Question("foreground", "what shape is the body?", body),
        Question("foreground", "how many limbs are there?", limbs),
        Question("background", "what texture is the background?", texture),
        Question("background", "how many distractors are there?", distractors),
        Question("caption", "describe the picture", caption),
    ]


@dataclass(frozen=True)
class Scenes:
    """Scenes of ``size`` pixels a side, without end; those with negative indices are held out."""

    size: int = 64

    @property
    def classes(self) -> list[str]:
        return [f"{body} body, {head} head" for body, head in product(SHAPES, SHAPES)]

    @property
    def digest(self) -> str:
        """Tells data apart."""
        return f"scenes-{self.size}"

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The images ``[size, 3, H, W]`` and labels ``[size]`` of a step, which are new in every step."""
        found = self.batch_scenes(step, size, seed)
        return found.images, found.labels

    def batch_scenes(self, step: int, size: int, seed: int) -> SceneBatch:
        """The ``size`` scenes of a step."""
        return scenes(torch.arange(step * size, (step + 1) * size), seed, self.size)

    def held_out(self, limit: int) -> tuple[Tensor, Tensor]:
        """The images ``[limit, 3, H, W]`` and labels ``[limit]`` of :meth:`held_out_scenes`."""
        found = self.held_out_scenes(limit)
        return found.images, found.labels

    def held_out_scenes(self, limit: int) -> SceneBatch:
        """``limit`` scenes, always the same ones, that no :meth:`batch` holds."""
        return scenes(-1 - torch.arange(limit), 0, self.size)


def scenes(indices: Tensor, seed: int, size: int = 64) -> SceneBatch:
    """The scenes ``indices [B]`` (int64) of a world that ``seed`` tells from others; ``size``: pixels of a side.

    A scene depends on index and seed alone, to the bit: shapes are placed in float64, and pixels are made by operations
    that are rounded alike in every batch.
    """
    draw = Draws(indices, seed)
    body, head, texture = (_choice(draw(), len(names)) for names in (SHAPES, SHAPES, TEXTURES))
    limbs, distractors = (1 + _choice(draw(), MOST) for _ in range(2))
    thing = _placed(draw, _object(draw, body, head, limbs))
    shapes = [*_distractors(draw, distractors, thing), *thing]
    ground = _ground(draw)
    colours = _colours(draw, ground)

    grid = (torch.arange(size) + 0.5) / size
    first, second = ground[..., None, None].unbind(dim=1)
    image = first.lerp(second, _pattern(draw, texture, grid)[:, None])
    parts = torch.zeros(len(indices), size, size, dtype=torch.uint8)
    for shape, colour, part in zip(shapes, colours, PAINTED, strict=True):
        depth = shape.depth(grid)
        cover, inner = ((0.5 + size * (depth - border)).clamp(0, 1) for border in (0.0, BORDER))
        image.lerp_(colour[..., None, None] * inner[:, None], cover[:, None])
        parts.masked_fill_(cover > 0.5, part)
    image += NOISE * (2 * draw(1, size, size).float() - 1)
    return SceneBatch((255 * image.clamp(0, 1)).round() / 127.5 - 1, parts, body, head, limbs, texture, distractors)


# -- chance ---------------------------------------------------------------------------------------------------------


def _signed(number: int) -> int:
    """The lowest 64 bits of a number, as int64 has them."""
    return (number + 2**63) % 2**64 - 2**63


def _mixed(bits: Tensor) -> Tensor:
    """A step of splitmix64 (Steele et al., 2014), in int64, whose arithmetic wraps around."""
    bits = bits + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return bits ^ (bits >> 31 & (1 << 33) - 1)


class Draws:
    """Uniform numbers, each of which depends on seed, index and how many were drawn before it."""

    def __init__(self, indices: Tensor, seed: int) -> None:
        self.keys = _mixed(_mixed(torch.tensor(_signed(seed))) + indices)
        self.drawn = 0

    def __call__(self, *shape: int) -> Tensor:
        """The next ones, ``[B, *shape]`` float64, from 0 to 1."""
        numbers = torch.arange(self.drawn, self.drawn + prod(shape))
        self.drawn += prod(shape)
        bits = _mixed(self.keys[:, None] + numbers) >> 11 & (1 << 53) - 1
        return (bits.double() / 2**53).view(-1, *shape)

    def between(self, low: float, high: float) -> Tensor:
        """One, ``[B]``, from ``low`` to ``high``."""
        return low + (high - low) * self()

    def direction(self, most: float) -> Tensor:
        """A complex number of length 1, ``[B]``, at up to ``most`` degrees to either side."""
        angle = self.between(-most, most)
        return torch.polar(torch.ones_like(angle), angle.deg2rad())


def _choice(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).long()


# -- shapes ---------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A shape in each of ``B`` planes, whose points are complex numbers: x to the right, y down.

    kind [B] int64, of ``SHAPES``; centre and axis (the direction of its own x, length 1) [B] complex128; radius [B]
    float64; stretch [B] float64, of squares along their own x.
    """

    kind: Tensor
    centre: Tensor
    axis: Tensor
    radius: Tensor
    stretch: Tensor

    def outline(self) -> Tensor:
        """Points of it, ``[B, 8]``."""
        x, y = OUTLINES[self.kind].unbind(-1)
        own = torch.complex(x * self.stretch[:, None], y) * self.radius[:, None]
        return self.centre[:, None] + self.axis[:, None] * own

    def moved(self, origin: Tensor, axis: Tensor, scale: Tensor) -> Shape:
        """Turned, scaled, then shifted, all ``[B]``."""
        centre = origin + axis * scale * self.centre
        return self._replace(centre=centre, axis=axis * self.axis, radius=scale * self.radius)

    def depth(self, grid: Tensor) -> Tensor:
        """How far inside its border the points ``grid x grid`` are, ``[B, size, size]`` float32; below 0 outside."""
        x, y = _seen_from(self.centre * self.axis.conj(), self.axis, grid)
        radius, stretch = self.radius.float()[:, None, None], self.stretch.float()[:, None, None]
        disc = radius - (x * x + y * y).sqrt()
        x = x.abs()
        square = torch.minimum(SIDE * radius * stretch - x, SIDE * radius - y.abs())
        triangle = INRADIUS * radius - torch.maximum(y, sqrt(3) / 2 * x - y / 2)
        kind = self.kind[:, None, None]
        return torch.where(kind == 0, disc, torch.where(kind == 1, square, triangle))


def _seen_from(origin: Tensor, axis: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of ``z * axis.conj() - origin``, ``[B, size, size]`` float32, for the points z of ``grid x grid``."""
    ax, ay, x, y = (part.float()[:, None] for number in (axis, origin) for part in (number.real, number.imag))
    return (ax * grid - x)[:, None] + (ay * grid)[..., None], (ax * grid - y)[..., None] - (ay * grid)[:, None]


def _object(draw: Draws, body: Tensor, head: Tensor, limbs: Tensor) -> list[Shape]:
    """Four limbs, body and head, around the middle of the body. Limbs too many lie hidden below the body."""
    one = torch.ones_like(draw.keys, dtype=torch.float64)
    upright, square = torch.complex(one, 0 * one), torch.full_like(body, SHAPES.index("square"))
    found, place = [], draw(MOST).argsort(dim=1)
    for number, angle in enumerate(LIMB_ANGLES):
        axis = draw.direction(LIMB_SWING) * cmath.rect(1, radians(angle))
        reach = torch.where(place[:, number] < limbs, LIMB_REACH, LIMB_HIDDEN)
        found.append(Shape(square, axis * reach / 2, axis, LIMB_WIDTH / SIDE * one, reach / 2 / LIMB_WIDTH))
    radius = draw.between(*HEAD_RADIUS)
    neck = radius * OUTLINES[head, :, 1].amax(dim=1) - OUTLINES[body, :, 1].amin(dim=1) - OVERLAP
    return [*found, Shape(body, 0 * upright, upright, one, one), Shape(head, -1j * neck, upright, radius, one)]


def _placed(draw: Draws, shapes: Sequence[Shape]) -> list[Shape]:
    """An object at random in the image, whose sides are 1, and wholly inside."""
    tilt = draw.direction(TILT)
    outline = tilt[:, None] * torch.cat([shape.outline() for shape in shapes], dim=1)
    low, high = (torch.stack([edge(outline.real, 1), edge(outline.imag, 1)]) for edge in (torch.amin, torch.amax))
    area = draw.between(BODY_RADIUS[0] ** 2, BODY_RADIUS[1] ** 2)
    scale = torch.minimum(area.sqrt(), 1 / (high - low).amax(dim=0))
    x, y = draw(2).T * (1 - scale * (high - low)) - scale * low
    return [shape.moved(torch.complex(x, y), tilt, scale) for shape in shapes]


def _distractors(draw: Draws, count: Tensor, shapes: Sequence[Shape]) -> list[Shape]:
    """Four shapes apart from one another and from ``shapes``, as far as there is room; those too many out of sight."""
    found: list[Shape] = []
    while len(found) < MOST:
        kind, radius = _choice(draw(), len(SHAPES)), draw.between(*DISTRACTOR_RADIUS)
        bar = (kind == SHAPES.index("square")) & (draw() < BARS)
        stretch = torch.where(bar, BAR_STRETCH, 1.0)
        radius = radius / stretch.sqrt()
        most = (radius * stretch)[:, None]
        x, y = (most + (1 - 2 * most) * draw(TRIES) for _ in range(2))
        places = torch.complex(x, y)
        others = ((places - s.centre[:, None]).abs() - (s.radius * s.stretch)[:, None] for s in (*shapes, *found))
        room = torch.stack(list(others)).amin(dim=0) - most
        best = room.clamp(max=GAP).argmax(dim=1, keepdim=True)
        found.append(Shape(kind, places.gather(1, best)[:, 0], draw.direction(180), radius, stretch))
    return [s._replace(centre=s.centre + 9 * (count <= number)) for number, s in enumerate(found)]


# -- colours --------------------------------------------------------------------------------------------------------


def _ground(draw: Draws) -> Tensor:
    """The two colours of the background, ``[B, 2, 3]`` float32."""
    first = DARKEST + (1 - DARKEST) * draw(3)
    step = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * draw(3)
    return torch.stack([first, torch.where(first < (1 + DARKEST) / 2, first + step, first - step)], dim=1).float()


def _colours(draw: Draws, ground: Tensor) -> list[Tensor]:
    """Of distractors, limbs, body and head, ``[B, 3]`` float32 each."""

    def fresh() -> Tensor:
        """Of some colours the one that is most unlike ``ground``."""
        palette = (DARKEST + (1 - DARKEST) * draw(PALETTE, 3)).float()
        contrast = (palette[:, :, None] - ground[:, None]).abs().amax(dim=-1).amin(dim=-1)
        return palette[torch.arange(len(palette)), contrast.argmax(dim=1)]

    body = fresh()
    head, limbs = (torch.where(draw(1) < LIKE_BODY, body, fresh()) for _ in range(2))
    parts = torch.stack([body, head, limbs], dim=1)
    found = [
        torch.where(draw(1) < LIKE_PART, parts[torch.arange(len(parts)), _choice(draw(), 3)], fresh())
        for _ in range(MOST)
    ]
    return [*found, *MOST * [limbs], body, head]


def _pattern(draw: Draws, texture: Tensor, grid: Tensor) -> Tensor:
    """Where the background has its second colour, ``[B, size, size]`` float32 from 0 to 1."""
    axis = draw.direction(180)
    waves = _seen_from(torch.complex(draw(), draw()), axis * draw.between(5, 9), grid)
    along, across = (4 * (wave - wave.floor() - 0.5).abs() - 1 for wave in waves)
    slope, _ = _seen_from(0 * axis, axis, grid - 0.5)
    cells, cell = draw(CELLS, CELLS).float(), (CELLS * grid).long()
    patterns = {
        "stripes": 3 * along,
        "checks": 6 * along * across,
        "dots": 4 * (0.6 - (1 - along) ** 2 - (1 - across) ** 2),
        "gradient": 1.6 * slope,
        "noise": 2 * cells[:, cell[:, None], cell] - 1,
    }
    found = torch.zeros_like(along)
    for number, name in enumerate(TEXTURES):
        found = torch.where(texture[:, None, None] == number, patterns[name], found)
    return (0.5 + found / 2).clamp(0, 1)
