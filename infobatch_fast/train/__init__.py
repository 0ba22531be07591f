"""The trainer: `python -m infobatch_fast.train --ratio 0.5`."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from infobatch_fast.train.__main__ import main  # torch and the data sets, only when called

    return main(arguments)
