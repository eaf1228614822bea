"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from springtide.attention.policy import Policy
from springtide.errors import SpringtideError
from springtide.files import reason, replacing
from springtide.options import spelled


def check_target(*paths: Path | None) -> None:
    """Raise SpringtideError, before any work is done, for a file that could not be written after it, or named twice."""
    given = [path for path in paths if path is not None]
    if len({path.resolve() for path in given}) < len(given):
        raise SpringtideError(f"'{given[0]}' is named twice; choose a file for each result.")
    for path in given:
        folder = path.parent
        if not folder.is_dir():
            raise SpringtideError(f"'{path}' cannot be written: there is no folder '{folder}'; create it first.")
        if path.exists() and not path.is_file():
            raise SpringtideError(f"'{path}' cannot be written, for it is no plain file; choose another place.")
        try:
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise SpringtideError(f"'{path}' cannot be written ({reason(error)}); choose another place.") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; raises SpringtideError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def labels(policies: Sequence[Policy]) -> list[str]:
    """A name for each policy: its own, with the options in which policies of that name differ (but for the budget)."""
    names = []
    for policy in policies:
        alike = [other for other in policies if other.name == policy.name]
        options = [field.name for field in fields(policy) if field.name not in ("budget", "map")]
        varied = [name for name in options if len({getattr(other, name) for other in alike}) > 1]
        text = ",".join(f"{name}={spelled(getattr(policy, name))}" for name in varied)
        names.append(f"{policy.name}:{text}" if text else policy.name)
    return names


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows that share their keys, which become the columns.

    Names are broken into lines where the columns are too many for the terminal; cells never are.
    """
    if not rows:
        return
    console, unlimited = Console(), Console(width=10_000)
    for space in (" ", "\n"):
        table = Table(box=None, header_style="bold")
        for name, value in rows[0].items():
            justify: Literal["left", "right"] = "left" if isinstance(value, str) else "right"
            table.add_column(name.replace("_", space).replace(" ", space), justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*(shown(value) for value in row.values()))
        width = unlimited.measure(table).maximum
        if width <= console.width:
            break
    console.width = max(console.width, width)
    console.print(table)


def shown(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_lines(
    path: Path,
    series: Mapping[str, tuple[Sequence[float | None], Sequence[float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
) -> None:
    """A picture of named lines ``(xs, ys)``; a value that has no x (None) becomes a horizontal line."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for number, (name, (xs, ys)) in enumerate(series.items()):
        if xs[0] is None:
            axes.axhline(ys[0], label=name, color=f"C{number}", linestyle=":")
        else:
            axes.plot(xs, ys, marker="o", label=name, color=f"C{number}")
    places = sorted({x for xs, _ in series.values() for x in xs if x is not None})
    if log_x and places:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(places, [str(place) for place in places])
    elif places:
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xticks([])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    _save(figure, path)


def plot_curve(path: Path, points: Sequence[Any]) -> None:
    """Divergence of answers and of text (solid, dashed) over dense layers, bytes and milliseconds, a line a budget.

    Milliseconds are left out where no layout saves any. ``points`` are :class:`springtide.evaluation.calibrate.Point`.
    """
    pyplot = _pyplot()
    axes: dict[str, Callable[[Any], float]] = {
        "dense layers": lambda point: point.dense_layers,
        "MB of the cache read for a token": lambda point: point.kv_bytes / 1e6,
    }
    if len({point.predicted_ms for point in points}) > 1:
        axes["predicted ms a token"] = lambda point: point.predicted_ms
    figure, panels = pyplot.subplots(1, len(axes), figsize=(2 + 4 * len(axes), 4.2), layout="constrained", sharey=True)
    for number, budget in enumerate(sorted({point.budget for point in points})):
        own = [point for point in points if point.budget == budget]
        for panel, (name, x) in zip(panels, axes.items(), strict=True):
            line = sorted(own, key=x)
            for kind, style in (("kl_questions", "-"), ("kl_text", "--")):
                label = f"{kind[3:]}, budget {budget}" if panel is panels[0] else None
                ys = [getattr(point, kind) for point in line]
                panel.plot([x(point) for point in line], ys, style, marker="o", color=f"C{number}", label=label)
            panel.set_xlabel(name)
    panels[0].set_ylabel("KL to dense (nats a token)")
    panels[0].set_yscale("log")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    _save(figure, path)


def plot_drafts(path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], float]]]) -> None:
    """For each kind of text its drafters, by name: acceptance by position (from 1) as lines, speed-up as bars.

    A drafter's line and bar have one colour.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(len(panels), 2, figsize=(10, 3.8 * len(panels)), squeeze=False)
    for (text, drafters), (left, right) in zip(panels.items(), axes, strict=True):
        for number, (name, (shares, speedup)) in enumerate(drafters.items()):
            left.plot(range(1, len(shares) + 1), shares, marker="o", color=f"C{number}")
            right.barh(name, speedup, color=f"C{number}")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylim(bottom=0)
        left.set_xlabel("drafted token")
        left.set_ylabel(f"accepted (share of passes), {text}")
        right.axvline(1, color="black", linewidth=0.8)
        right.invert_yaxis()
        right.set_xlabel(f"speed-up over no drafter, {text}")
        for axis in (left, right):
            axis.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    finally:
        _pyplot().close(figure)
