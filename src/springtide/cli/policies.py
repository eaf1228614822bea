"""``springtide policies``."""

from __future__ import annotations


def policies() -> None:
    """The attention policies with their options."""
    from springtide.attention import POLICIES
    from springtide.options import options

    for name, policy in POLICIES.kinds.items():
        print(f"{name}: {(policy.__doc__ or '').splitlines()[0].replace('``', '')}")
        for option in options(policy):
            default = "" if option.default is None else f" (default: {option.default})"
            print(f"    {option.name:10} {option.metadata['help']}{default}")
