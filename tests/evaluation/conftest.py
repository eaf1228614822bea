"""The command line as the other tests run it."""

from test_cli import run

__all__ = ["run"]
