"""A page that shows what a DependencyViT made of an image: its tree, saliency and parts, and what was pruned."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.path import Path
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from springtide.files import replacing
from springtide.vision.tree import Grid, Output, Parts, Saliency, Tree, layers

PIXELS = 1024  # of the longer side of the image that is drawn, at most
DPI = 110
WIDTH, LOWEST, HIGHEST = 15.0, 5.0, 12.0  # inches: the page, and limits of the height of its upper panels
ABREAST = 6  # images in a row of those that show what was kept
LINE, LINES = 31, 4  # characters of a line of a fact, and its lines at most
BEND = 0.12  # of the tree's edges, as a share of their length; it tells apart those that lie in one line
OUTLINE = "#00e5ff"
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")  # Okabe and Ito's

Pixels = NDArray[np.floating[Any]]


def draw_page(
    path: FilePath,
    image: Image,
    output: Output,
    tree: Tree,
    saliency: Saliency,
    parts: Parts,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a page as PNG, whole or not at all.

    Args:
        image: RGB, of any size; it is drawn in the shape in which the model saw it.
        output: the model's, of this image alone.
        tree, saliency, parts: what was found in it, see :mod:`springtide.vision.tree`.
        facts: names and values to list first, such as the file's name and the predicted class.

    Raises SpringtideError when it cannot be written.
    """
    grid = saliency.grid
    image = image.copy()
    image.thumbnail((PIXELS, PIXELS))
    pixels = np.asarray(image.convert("RGB")) / 255
    stages = _stages(layers(output, grid.tokens)[0].cpu(), len(output.kept))

    shape = grid.rows / grid.columns
    rows = -(-len(stages) // ABREAST) if len(stages) > 1 else 0
    columns = max(4, -(-len(stages) // max(rows, 1)))
    high = min(max(0.47 * WIDTH * shape + 0.6, LOWEST), HIGHEST)
    low = 0.5 + rows * (WIDTH / columns * shape + 0.3)
    figure = Figure(figsize=(WIDTH, high + low), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[high, low])[:, 0]
    axes = above.subplot_mosaic([["tokens", "tree", "tree", "saliency"], ["facts", "tree", "tree", "parts"]])
    _draw_tokens(axes["tokens"], pixels, grid)
    _draw_facts(axes["facts"], {**(facts or {}), **_found(tree, saliency, parts)})
    _draw_tree(axes["tree"], pixels, tree, saliency, parts)
    _draw_saliency(axes["saliency"], pixels, saliency)
    _draw_parts(axes["parts"], pixels, parts)
    if rows:
        below.suptitle("Tokens that are kept, by layer")
        places = below.subplots(rows, columns, squeeze=False).flat
        for axis in places[len(stages) :]:
            axis.axis("off")
        for axis, (title, kept) in zip(places, stages, strict=False):
            _show(axis, pixels, grid, title)
            _cover(axis, grid, "black", torch.where(kept, 0.0, 0.8))
    else:
        below.suptitle(f"Nothing pruned: all {grid.tokens} tokens went through all {len(output.kept)} layers")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _stages(through: Tensor, count: int) -> list[tuple[str, Tensor]]:
    """Titles, and which tokens are there, ``[N]``, for the layers between one pruning and the next.

    ``through [N]``: see :func:`springtide.vision.tree.layers`, of ``count`` layers.
    """
    found, first = [], 1
    for number in sorted(set(through.tolist())):
        kept, last = through >= number, min(number, count)
        where = "at the end" if first > count else f"layer {first}" if first == last else f"layers {first} to {last}"
        found.append((f"{where}: {int(kept.sum())} tokens", kept))
        first = number + 1
    return found


def _found(tree: Tree, saliency: Saliency, parts: Parts) -> dict[str, str]:
    """What to list of the results."""
    grid = saliency.grid
    row, column = divmod(tree.root, grid.columns)
    sizes = [str(size) for size in parts.labels.bincount()[1:].tolist()]
    return {
        "tokens": f"{grid.rows} x {grid.columns}, of {grid.patch} x {grid.patch} pixels",
        "root": f"row {row + 1}, column {column + 1}",
        "depth": f"{tree.depth}, with {int((tree.sizes == 1).sum())} leaves",
        "foreground": f"{int(saliency.foreground.sum())} tokens",
        "parts": f"of {', '.join(sizes)} tokens" if sizes else "none",
    }


# -- panels ---------------------------------------------------------------------------------------------------------


def _draw_tokens(axes: Axes, pixels: Pixels, grid: Grid) -> None:
    _show(axes, pixels, grid, "Image and tokens")
    for column in range(1, grid.columns):
        axes.axvline(column - 0.5, color="white", linewidth=0.6, alpha=0.6)
    for row in range(1, grid.rows):
        axes.axhline(row - 0.5, color="white", linewidth=0.6, alpha=0.6)


def _draw_facts(axes: Axes, facts: Mapping[str, str]) -> None:
    axes.axis("off")
    names, values = [], []
    for name, value in facts.items():
        lines = textwrap.wrap(value, LINE, max_lines=LINES, placeholder=" ...") or [""]
        names += [name] + [""] * (len(lines) - 1)
        values += lines
    for column, place, colour in ((names, 0.0, "0.45"), (values, 0.3, "black")):
        text = axes.text(place, 0.97, "\n".join(column), color=colour, linespacing=1.7, va="top")
        text.set_in_layout(False)


def _draw_tree(axes: Axes, pixels: Pixels, tree: Tree, saliency: Saliency, parts: Parts) -> None:
    """Edges are as thick as the share of its messages that a child sends to its parent, in the colour of its part."""
    grid, inside = saliency.grid, saliency.foreground.tolist()
    _show(axes, pixels, grid, "Dependency tree: each token is joined to its parent, the root is starred")
    _cover(axes, grid, "black", torch.full((grid.tokens,), 0.5))
    y, x = np.divmod(np.arange(grid.tokens), grid.columns)
    places = np.stack([x, y], 1)
    colours = [_colour(label) if label else "0.8" for label in parts.labels.tolist()]
    widths = (40 / max(grid.rows, grid.columns) * tree.weights / tree.weights.max().clamp(min=1e-9)).tolist()
    for strong in (False, True):
        chosen = [token for token in tree.order[1:] if strong == (inside[token] and inside[int(tree.parents[token])])]
        edges = PathCollection(
            [_edge(places[token], places[int(tree.parents[token])]) for token in chosen],
            facecolors="none",
            edgecolors=[colours[token] if strong else "white" for token in chosen],
            linewidths=[0.3 + widths[token] * (1 if strong else 0.3) for token in chosen],
            alpha=1 if strong else 0.4,
        )
        axes.add_collection(edges, autolim=False)
    size = (64 / grid.tokens) ** 0.5 * (8 + 12 * tree.sizes.double().log2().numpy())
    axes.scatter(x, y, s=size, facecolors=colours, edgecolors="black", linewidths=0.8, zorder=3)
    root = tree.root
    axes.plot(x[root], y[root], "*", markersize=20, color=colours[root], markeredgecolor="white", zorder=4)


def _edge(child: NDArray[np.int64], parent: NDArray[np.int64]) -> Path:
    """A line that bends to one side on its way up."""
    x, y = parent - child
    corner = (child + parent) / 2 + BEND * np.array([-y, x])
    return Path([child, corner, parent], [Path.MOVETO, Path.CURVE3, Path.CURVE3])


def _draw_saliency(axes: Axes, pixels: Pixels, saliency: Saliency) -> None:
    grid = saliency.grid
    _show(axes, _grey(pixels), grid, "Saliency, foreground outlined")
    heat = axes.imshow(saliency.map.numpy(), vmin=0, vmax=1, cmap="inferno", alpha=0.65, extent=_extent(grid))
    _outline(axes, saliency.foreground, grid, OUTLINE)
    bar = axes.figure.colorbar(heat, ax=axes, fraction=0.046, pad=0.02)
    bar.ax.axhline(saliency.threshold, color=OUTLINE, linewidth=2)


def _draw_parts(axes: Axes, pixels: Pixels, parts: Parts) -> None:
    _show(axes, _grey(pixels), parts.grid, "Parts of the foreground")
    _cover(axes, parts.grid, "black", torch.where(parts.labels > 0, 0.0, 0.6))
    for label in range(1, int(parts.labels.max()) + 1):
        own = parts.labels == label
        _cover(axes, parts.grid, _colour(label), torch.where(own, 0.6, 0.0))
        _outline(axes, own, parts.grid, _colour(label))


def _colour(label: int) -> str:
    return COLOURS[(label - 1) % len(COLOURS)]


def _grey(pixels: Pixels) -> Pixels:
    grey: Pixels = pixels.mean(-1, keepdims=True).repeat(3, -1)
    return grey


# -- drawing in the coordinates of tokens: the middle of the first is at 0, 0 ---------------------------------------


def _show(axes: Axes, pixels: Pixels, grid: Grid, title: str) -> None:
    axes.imshow(pixels, extent=_extent(grid), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=11)


def _extent(grid: Grid) -> tuple[float, float, float, float]:
    return -0.5, grid.columns - 0.5, grid.rows - 0.5, -0.5


def _cover(axes: Axes, grid: Grid, colour: str, opacity: Tensor) -> None:
    """Paint tokens over, each with its opacity, ``[N]``."""
    paint = np.empty((grid.rows, grid.columns, 4))
    paint[:] = to_rgba(colour)
    paint[..., 3] = opacity.view(grid.rows, grid.columns)
    axes.imshow(paint, extent=_extent(grid), interpolation="nearest")


def _outline(axes: Axes, chosen: Tensor, grid: Grid, colour: str) -> None:
    """Lines around the tokens that are ``chosen [N]``, bool."""
    mask = np.pad(chosen.view(grid.rows, grid.columns).numpy(), 1)
    level = [((x - 0.5, y - 0.5), (x + 0.5, y - 0.5)) for y, x in np.argwhere(mask[1:, 1:-1] != mask[:-1, 1:-1])]
    upright = [((x - 0.5, y - 0.5), (x - 0.5, y + 0.5)) for y, x in np.argwhere(mask[1:-1, 1:] != mask[1:-1, :-1])]
    axes.add_collection(LineCollection(level + upright, colors=colour, linewidths=2, capstyle="round"), autolim=False)
