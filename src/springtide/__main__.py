"""``python -m springtide`` is the command line."""

from springtide.cli import main

main()
