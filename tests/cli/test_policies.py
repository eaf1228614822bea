"""`springtide policies` as a user meets it."""

from __future__ import annotations

from dataclasses import fields

from springtide.attention import POLICIES


def test_policies_are_listed_with_their_options(run):
    result = run("policies")
    assert (result.code, result.err) == (0, "")
    for name, policy in POLICIES.kinds.items():
        assert f"{name}: " in result.out
        options = [field.name for field in fields(policy) if "help" in field.metadata]
        assert all(f"    {option} " in result.out for option in options)
