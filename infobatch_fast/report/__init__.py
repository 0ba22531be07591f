"""Tables and plots from the records of runs and benchmarks: `python -m infobatch_fast.report`."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from infobatch_fast.report.__main__ import main  # pandas and matplotlib, only when called

    return main(arguments)
