"""A report's blocks, as Markdown and as one HTML page that asks for nothing from outside.

Texts are plain: what a record holds is escaped here, and nowhere else.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from infobatch_fast.report import text as tables

MARK = "<!-- infobatch_fast report -->"  # begins what may be overwritten
_LONG = 48  # characters; a longer cell is wrapped


class Heading(NamedTuple):
    """A heading of level 1 to 4."""

    text: str
    level: int
    kind = "heading"


class Text(NamedTuple):
    """A paragraph; the answer is the one that a reader came for, an aside explains a table.

    Others are the settings that the answer is not of.
    """

    text: str
    role: str = ""
    kind = "text"


class Code(NamedTuple):
    """Commands to be copied."""

    lines: Sequence[str]
    kind = "code"


class Table(NamedTuple):
    """A table; the first `left` of its columns hold words."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    kind = "table"

    def cell(self, column: int, text: str) -> str:
        """The class of a cell."""
        words = "long" if len(text) > _LONG else "word"
        return words if column < self.left or len(text) > _LONG else ""


class Plot(NamedTuple):
    """A drawing, and what it shows in words."""

    title: str
    svg: Markup
    about: str
    kind = "plot"


Block = Heading | Text | Code | Table | Plot


def markdown(blocks: Iterable[Block]) -> str:
    """The report as Markdown, without its plots."""
    parts = [MARK]
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {_escaped(block.text)}")
            case Text():
                parts.append(_escaped(block.text))
            case Code():
                parts.append("\n".join(["```sh", *map(printable, block.lines), "```"]))
            case Table():
                rows = [[_escaped(cell) for cell in row] for row in (block.headers, *block.rows)]
                parts.append("\n".join(tables.markdown(rows[0], rows[1:], block.left)))
            case Plot():
                pass
    return "\n\n".join(parts) + "\n"


def terminal(blocks: Iterable[Block]) -> list[str]:
    """Lines for a terminal, which they cannot steer."""
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading():
                lines += ["", block.text]
            case Text():
                lines.append(block.text)
            case Code():
                lines += [f"  {line}" for line in block.lines]
            case Table():
                lines += tables.markdown(block.headers, block.rows, block.left)
            case Plot():
                pass
    return [printable(line) for line in lines]


def page(title: str, blocks: Sequence[Block]) -> str:
    """The report as an HTML page with everything in it."""
    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(autoescape=True, loader=folder).get_template("page.html.j2")
    groups = [(plots, [*group]) for plots, group in groupby(blocks, lambda b: b.kind == "plot")]
    return template.render(title=title, groups=groups, mark=Markup(MARK))


def printable(text: str) -> str:
    """A text in one line without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _escaped(text: str) -> str:
    """With a backslash before what Markdown would take for more than text."""
    return re.sub(r"([\\`*<>&~$]|(?<=\])\(|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))
