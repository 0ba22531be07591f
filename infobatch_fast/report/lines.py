"""A benchmark's line, which what writes it and what reads it share, and files of lines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from infobatch_fast.errors import UserError, reason
from infobatch_fast.train.records import Provenance, parse, read_object

LineT = TypeVar("LineT")


@dataclass(frozen=True, kw_only=True)
class Line(Provenance):
    """One row of a benchmark, a JSON object: all that its figure depends on, so that it may be
    quoted alone.

    Attributes:
        part: the table within it that the line is a row of.
        case: what was measured, in order, such as {"samples": 50000, "side": "device"}.
        unit: of the three that follow: "s", "images/s", "B/s" or "FLOP/s".
        count: measurements behind them.
        more: further figures of this row, each name ending in its unit.
        absent: why the row has no figures (then unit to count are None); None where it has.
        quick: whether it was a --quick run, too short to quote.
        started: UTC, ISO 8601.
    """

    benchmark: str
    part: str
    case: dict[str, Any]
    unit: str | None
    median: float | None
    p20: float | None
    p80: float | None
    count: int | None
    more: dict[str, Any]
    absent: str | None
    complete: bool
    quick: bool
    options: dict[str, Any]
    started: str


def read_lines(path: Path, kind: type[LineT]) -> tuple[list[LineT], list[str]]:
    """The lines of a file that can be read, and what is wrong with others.

    A last line without an end was being written when the process was killed: it is none.

    Raises:
        UserError: the file cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path.name} must be a regular file, got none")
    try:
        rows = path.read_text(errors="backslashreplace").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path.name}: {reason(error)}") from None
    lines, problems = [], []
    for number, row in enumerate(rows, 1):
        where = f"line {number} of {path.name}"
        try:
            lines += [parse(kind, read_object(row, where), where)] if row else []
        except UserError as error:
            problems += [str(error)] if number < len(rows) else []
    return lines, problems
