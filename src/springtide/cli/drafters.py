"""``springtide drafters``."""

from __future__ import annotations

from springtide.cli.show import print_options


def drafters() -> None:
    """The drafters with their options; those with weights are taken from the model's folder, or by their own."""
    from springtide.engine.drafters import DRAFTERS

    print_options(DRAFTERS)
