"""The command line as the other tests run it."""

from test_cli import folder, run

__all__ = ["folder", "run"]
