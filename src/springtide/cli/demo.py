"""``springtide demo``."""

from __future__ import annotations

from springtide.cli.inputs import Json, Model, excerpt


def demo(json_file: Json = None) -> None:
    """The bundled model reads a book with facts hidden in it and answers, with dense attention and TidalDecode."""
    from springtide.evaluation.demo import demo as run
    from springtide.evaluation.report import check_target, write_json

    check_target(json_file)
    result = run(Model().load(), excerpt())
    if json_file:
        write_json(json_file, result)
