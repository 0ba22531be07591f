"""The trainer: `python -m infobatch_fast.train --ratio 0.5`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infobatch_fast.train.loop import main

__all__ = ["main"]


def __getattr__(name: str) -> object:
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from infobatch_fast.train.loop import main

    return main
