"""``python -m stepdistill`` is the command line."""

from stepdistill.cli import main

main()
