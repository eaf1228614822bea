"""What every training run has: files that are whole, a checkpoint to go on from, a log, and a picture of its curves."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from springtide.errors import SpringtideError
from springtide.files import replacing
from springtide.training.progress import Progress

log = logging.getLogger(__name__)

AGAIN = "make room there and run the same command again; it continues from the last checkpoint"

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


# -- files ----------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Create a folder for a run; raises SpringtideError when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpringtideError(
            f"'{folder}' cannot be made a folder ({error.strerror}); choose another --out."
        ) from error


def cannot_write(path: Path, error: OSError) -> SpringtideError:
    return SpringtideError(f"'{path}' cannot be written ({error.strerror}); {AGAIN}.")


# -- checkpoint -----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint of the run that ``identity`` tells from others; whatever goes wrong, the old one stays."""
    buffer = io.BytesIO()
    torch.save({"identity": dict(identity), **state}, buffer)
    with replacing(path, AGAIN) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, None if there is none; raises SpringtideError for a broken one or one of another run."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the file may hold anything
        raise SpringtideError(f"{path} cannot be read: delete it to start anew.") from error
    saved = state.get("identity", {})
    differing = [key for key, value in identity.items() if saved.get(key) != value]
    if differing:
        raise SpringtideError(
            f"{path} belongs to another {' and '.join(differing)}: "
            "choose another --out folder, or delete the file to start anew."
        )
    return state


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the step in progress is finished; a second interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


# -- log ------------------------------------------------------------------------------------------------------------


def progress_bar(progress: Progress, shown: bool = True) -> tqdm[Any]:
    """A bar on standard error, off when that is no terminal."""
    form = "{l_bar}{bar}| {n:g}/{total:g} {unit} [{elapsed}<{remaining}{postfix}]"
    disable = not (shown and sys.stderr.isatty())
    return tqdm(total=progress.length, initial=progress.passed, unit=progress.unit, bar_format=form, disable=disable)


def record(path: Path, values: Mapping[str, float], bar: tqdm[Any], shown: Sequence[str]) -> None:
    """Append ``values`` to a log of JSON lines; the bar, or Python's log if it is off, shows some of them."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error
    some = {key: values[key] for key in shown}
    bar.set_postfix(some)
    if bar.disable:
        log.info("step %d: %s", values["step"], ", ".join(f"{key} {value}" for key, value in some.items()))


def read_records(path: Path) -> list[dict[str, float]]:
    """The log; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def rewind(path: Path, step: int) -> None:
    """Drop from the log what came after ``step``, from which training goes on, and a line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    with replacing(path, AGAIN) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def draw(picture: Path, x: str, panels: Mapping[str, Curves]) -> None:
    """A picture of panels, one below the other: for each label of a y axis its named lines ``(xs, ys)``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 3.5 * len(panels)), sharex=True, squeeze=False)
    for axis, (label, curves) in zip(axes[:, 0], panels.items(), strict=True):
        for name, (xs, ys) in curves.items():
            axis.plot(xs, ys, label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(ncols=2)
    axes[-1, 0].set_xlabel(x)
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    try:
        with replacing(picture, AGAIN) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        pyplot.close(figure)
