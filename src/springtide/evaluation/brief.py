"""A calibration of a minute at most, for whoever uses TidalDecode without having calibrated the model."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from springtide.attention.tidal import Tidal
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.evaluation.calibrate import Wish, brief
from springtide.evaluation.report import write_json
from springtide.files import EXCERPT
from springtide.options import Share

LENGTH = 1024  # tokens of context
PROMPTS = 2
SECONDS = 60


def calibrate_briefly(engine: Engine, path: Path) -> dict[str, Any]:
    """Choose layers by gradients on a few prompts, say so, and keep them in a file (where nothing can be kept, not).

    Raises SpringtideError where that would take more than a minute.
    """
    length = min(LENGTH, engine.stack.spec.context_limit - 1)
    wish = Wish(Tidal(budget=Share(5)), length, prompts=PROMPTS)
    began, found = time.perf_counter(), None
    with tqdm(total=2 * PROMPTS, desc="calibrating briefly", leave=False, disable=None, delay=2) as bar:
        for done, found in enumerate(brief(engine, EXCERPT.read_text(encoding="utf-8"), wish), start=1):
            bar.update()  # which counts nothing where there is no terminal
            spent = time.perf_counter() - began
            if found is None and spent / done * 2 * PROMPTS > SECONDS:
                raise SpringtideError(
                    "tidal: the model is not calibrated, which would take more than a minute here; run "
                    "`springtide calibrate --model DIR` once, or take the paper's layers with tidal:layout=paper."
                )
    assert found is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        kept = f", kept in {path}"
    except (OSError, SpringtideError):
        kept = ""
    warnings.warn(
        f"tidal: the model was not calibrated, so it was now, in {time.perf_counter() - began:.0f} s{kept}; "
        "`springtide calibrate` does it better",
        stacklevel=2,
    )
    return found
