"""`springtide policies` and `springtide drafters` as a user meets them."""

from __future__ import annotations

import pytest

from springtide.attention import POLICIES
from springtide.engine.drafters import DRAFTERS
from springtide.options import options


@pytest.mark.parametrize(("verb", "registry"), [("policies", POLICIES), ("drafters", DRAFTERS)])
def test_what_has_a_name_is_listed_with_its_options(run, verb, registry):
    result = run(verb)
    assert (result.code, result.err) == (0, "")
    titles = [line.split(":")[0].split(", ") for line in result.out.splitlines() if line[0] != " "]
    assert [name for title in titles for name in title] == list(registry.kinds)
    for cls in registry.kinds.values():
        assert all(f"    {option.name} " in result.out for option in options(cls))
    assert "``" not in result.out
