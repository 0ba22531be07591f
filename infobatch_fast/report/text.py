"""Numbers and tables as text: they read well in a terminal and are Markdown as they stand."""

import statistics
from collections.abc import Sequence


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table, a line an element; the first `left` columns are aligned to the left."""
    cells = [[_plain(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(cells[0]), line(rule), *(line(row) for row in cells[1:])]


def seconds(value: float) -> str:
    """A time in the unit that suits it, to three figures: 12.3 us, 4.56 ms, 7.89 s."""
    size = abs(value)
    unit, factor = (
        ("s", 1.0) if size >= 0.9995 else ("ms", 1e3) if size >= 0.9995e-3 else ("us", 1e6)
    )
    return f"{figures(value * factor)} {unit}"


def amount(value: float, unit: str | None) -> str:
    """A measured value with its unit, which is made to suit it: 12.3 us, 1.02 TB/s."""
    if unit == "s":
        return seconds(value)
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6)) if unit in ("B/s", "FLOP/s") else ()
    prefix, factor = next((each for each in prefixes if abs(value) >= each[1]), ("", 1))
    return f"{figures(value / factor)} {prefix}{unit}"


def figures(value: float) -> str:
    """A number to three figures, without an exponent: 1,230, 45.6, 0.00789."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    digits = 0
    while magnitude < 99.95 and digits < 12:
        magnitude *= 10
        digits += 1
    return f"{value:,.{digits}f}"


def counted(number: int, word: str) -> str:
    """So many of a word: 1 epoch, 2 epochs."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def mean(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation (n - 1); a single value has none."""
    text = f"{statistics.fmean(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):,.{digits}f}"


def _plain(cell: str) -> str:
    return " ".join(str(cell).split()).replace("|", "\\|")
