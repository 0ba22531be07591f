"""Tables and plots from the records of runs and benchmarks: `python -m infobatch_fast.report`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infobatch_fast.report.__main__ import main

__all__ = ["main"]


def __getattr__(name: str) -> object:
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from infobatch_fast.report.__main__ import main

    return main
