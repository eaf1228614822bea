"""How much of a run is over, in steps and in minutes, and its learning rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.training.progress import POINTS, Minutes, Steps


@given(st.integers(1, 700))
def test_a_run_of_steps(steps):
    progress, points, scales = Steps(steps), 0, []
    while not progress.done:
        before = progress.points
        scales.append(progress.lr_scale)
        progress.step += 1
        points += progress.points > before
    assert (progress.step, points, progress.points) == (steps, min(steps, POINTS), POINTS)
    assert scales[progress.warmup - 1 :] == sorted(scales[progress.warmup - 1 :], reverse=True)
    assert all(0 < scale <= 1 for scale in scales)
    assert scales[0] == pytest.approx(1 / progress.warmup)


def test_a_run_of_minutes():
    progress = Minutes(10, warmup=4, final=0.1)
    assert progress.lr_scale == 0.25
    progress.step, progress.seconds = 50, 300.0
    assert (progress.passed, progress.share, progress.points, progress.done) == (5, 0.5, 50, False)
    assert progress.lr_scale == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert str(progress) == "step 50, minute 5.0 of 10"
    progress.seconds = 600.0
    assert progress.done and progress.lr_scale == pytest.approx(0.1)


def test_only_a_run_of_minutes_may_be_made_longer():
    assert Steps(3).identity != Steps(4).identity
    assert Minutes(3, warmup=1, final=0.0).identity == Minutes(4, warmup=1, final=0.0).identity


def test_no_steps_at_all():
    assert Steps(0).done and Minutes(0, warmup=1, final=0.0).done
