"""``springtide policies``."""

from __future__ import annotations

from springtide.cli.show import print_options


def policies() -> None:
    """The attention policies with their options."""
    from springtide.attention import POLICIES

    print_options(POLICIES)
