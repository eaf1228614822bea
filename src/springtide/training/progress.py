"""How much of a training run is over, counted in steps or in minutes, and the learning rate that goes with it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

WARMUP = 0.05  # share of a run that is counted in steps
POINTS = 100  # of the curves


class Progress(ABC):
    """Where a run stands: what is given to a trainer, and to all else that goes by it.

    Attributes:
        length: of the run, in ``unit``.
        warmup: steps in which the learning rate rises; then it falls, by a cosine over the run.
        final: what it falls to, as a share of the highest.
        step, seconds, count: steps that are done, the time that they took, and the tokens or images in them.
    """

    unit: ClassVar[str]

    def __init__(self, length: float, warmup: int, final: float) -> None:
        self.length, self.warmup, self.final = length, warmup, final
        self.step, self.seconds, self.count = 0, 0.0, 0

    @property
    @abstractmethod
    def passed(self) -> float:
        """How much of the length is over."""

    @property
    def identity(self) -> dict[str, float]:
        """What tells a run from another, by the option that sets it."""
        return {}

    @property
    def done(self) -> bool:
        return self.passed >= self.length

    @property
    def share(self) -> float:
        """How much of the run is over."""
        return self.passed / self.length

    @property
    def points(self) -> int:
        """How many points of the curves are due."""
        return int(POINTS * self.passed / self.length)

    @property
    def lr_scale(self) -> float:
        """The next step's learning rate, as a share of the highest."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.share))
        return min(1.0, (self.step + 1) / self.warmup) * (self.final + (1 - self.final) * cosine)

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.seconds, self.count = state["step"], state["seconds"], state["count"]


class Steps(Progress):
    """A run of so many steps: with more of them it would have been another from the start."""

    unit = "step"

    def __init__(self, steps: int) -> None:
        super().__init__(steps, warmup=max(1, round(WARMUP * steps)), final=0.0)

    def __str__(self) -> str:
        return f"step {self.step} of {self.length}"

    @property
    def passed(self) -> float:
        return self.step

    @property
    def identity(self) -> dict[str, float]:
        return {"--steps": self.length}


class Minutes(Progress):
    """A run of so many minutes of training, which may be made longer."""

    unit = "min"

    def __str__(self) -> str:
        return f"step {self.step}, minute {self.passed:.1f} of {self.length:g}"

    @property
    def passed(self) -> float:
        return self.seconds / 60
