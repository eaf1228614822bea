"""The floors of the house: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import springtide

ROOT = Path(springtide.__file__).parent
FILES = {
    ".".join(("springtide", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

COMPILED = {"springtide.kernels._cpu"}


def imports(path):
    """Modules of the package that a file imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{name.name}" for name in node.names} & set(FILES) or {node.module}
    return {name for name in found if name.split(".")[0] == "springtide"} - COMPILED


GRAPH = {name: imports(path) for name, path in FILES.items()}


def within(name, *rooms):
    return any(name == f"springtide.{room}" or name.startswith(f"springtide.{room}.") for room in rooms)


def wrong(importers, *, allowed=None, forbidden=()):
    """The imports by ``importers`` that are forbidden, or not among the allowed ones."""
    return [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        if within(name, *importers)
        for other in others
        if within(other, *forbidden) or (allowed is not None and not within(other, *allowed))
    ]


def test_the_graph_was_read():
    assert "springtide.rows.segment" in GRAPH["springtide.attention.policy"]
    assert "springtide.kernels" in GRAPH["springtide.attention.policy"]
    assert "springtide.kernels.reference" in GRAPH["springtide.kernels"]
    assert all(other in FILES for others in GRAPH.values() for other in others)


def test_kernels_know_nothing_of_springtide():
    assert wrong(["kernels"], allowed=["kernels", "errors"]) == []


def test_attention_and_drafting_do_not_know_each_other():
    assert wrong(["attention"], forbidden=["drafting"]) == []
    assert wrong(["drafting"], forbidden=["attention"]) == []


def test_vision_is_a_room_of_its_own():
    """The model of vision knows nothing of language; its bridge to it imports the engine, never the reverse."""
    bridge = {
        "springtide.vision.captioner",
        *(name for name in FILES if within(name, "vision.training", "vision.evaluation")),
    }
    model = [name.removeprefix("springtide.") for name in FILES if within(name, "vision") and name not in bridge]
    assert wrong([name for name in model if name != "vision"], allowed=["vision", "errors", "files"]) == []
    others = [name.removeprefix("springtide.") for name in FILES if not within(name, "vision", "cli", "__main__")]
    assert wrong([name for name in others if name != "springtide"], forbidden=["vision"]) == []


def test_rows_and_cache_know_neither_policies_nor_drafters():
    assert wrong(["rows"], allowed=["errors", "kernels", "rows"]) == []


def test_a_pass_knows_no_requests():
    assert wrong(["model"], forbidden=["engine"]) == []
    assert wrong(["attention", "drafting"], forbidden=["model", "engine"]) == []


def test_nothing_below_the_command_line_imports_it():
    others = [name.removeprefix("springtide.") for name in FILES if not within(name, "cli", "__main__")]
    assert wrong([name for name in others if name != "springtide"], forbidden=["cli"]) == []
    assert "springtide.cli" not in GRAPH["springtide"]


def test_verbs_do_not_know_one_another():
    verbs = [name.removeprefix("springtide.") for name in FILES if within(name, "cli") and name != "springtide.cli"]
    shared = {"springtide.cli.inputs", "springtide.cli.show"}
    known = {other for verb in verbs for other in GRAPH[f"springtide.{verb}"] if within(other, "cli")}
    assert known == shared


def test_decoding_knows_nothing_of_what_is_built_on_it():
    assert (
        wrong(
            ["engine", "model", "rows", "attention", "drafting", "kernels"],
            forbidden=["training", "evaluation", "benchmarks", "integrations", "loading", "cli"],
        )
        == []
    )


def test_models_are_trained_and_used_without_benchmarks():
    assert wrong(["loading", "training", "evaluation", "integrations"], forbidden=["benchmarks", "cli"]) == []


def test_there_are_no_circles():
    """No module imports itself by way of others."""
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in GRAPH[name] - {"springtide"}:
                visit(other, (*trail, name))
            done.add(name)

    for name in FILES:
        if name != "springtide":
            visit(name, ())
