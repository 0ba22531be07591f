"""A report's blocks, as Markdown and as one HTML page that asks for nothing from outside.

Texts are plain: whatever a record holds is escaped here, and nowhere else.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from infobatch_fast.report import text as tables


class Heading(NamedTuple):
    """A heading of level 1, 2 or 3."""

    text: str
    level: int


class Text(NamedTuple):
    """A paragraph, and where it can be read about."""

    text: str
    link: str | None = None


class Table(NamedTuple):
    """A table; the first `left` of its columns hold words."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


class Plot(NamedTuple):
    """A drawing in SVG, whose text is paths, with what it shows in words."""

    svg: str
    title: str
    alt: str


MARK = "<!-- infobatch_fast report -->"  # begins what may be overwritten
_LONG = 40  # characters; a longer cell holds words, whatever its column does, and is wrapped
Block = Heading | Text | Table | Plot

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --line: #c9c9c9;
  --soft: #f2f3f5; --link: #0b5394; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #15171a; --line: #474b52; --soft: #22262b; --link: #8ec5ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
nav { max-width: 80rem; margin: 0 auto; padding: 1rem 1rem 0; display: flex; flex-wrap: wrap;
  gap: 0.25rem 1.25rem; }
main { max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p { max-width: 50rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.4rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
thead th { background: var(--soft); vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: var(--soft); }
.word { text-align: left; }
.long { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
tbody th { font-weight: 500; }
@media (max-width: 40rem) { tbody th, .word { white-space: normal; } }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 1rem 0; flex: 1 1 30rem; max-width: 46rem; min-width: 0; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; max-width: 100%; height: auto; margin-top: 0.3rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media print {
  :root { color-scheme: light; --text: #000; --page: #fff; --line: #999; --soft: #eee;
    --link: #000; }
  nav { display: none; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  table { font-size: 0.7rem; }
  th, td { padding: 0.15rem 0.3rem; }
  figure, tr { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""


def markdown(blocks: Iterable[Block]) -> str:
    """The report as Markdown; of its plots it says where they are."""
    parts = [MARK]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_escaped(block.text)}")
        elif isinstance(block, Text):
            link = f" <{block.link}>" if block.link else ""
            parts.append(_escaped(block.text) + link)
        elif isinstance(block, Table):
            rows = [[_escaped(cell) for cell in row] for row in block.rows]
            headers = [_escaped(header) for header in block.headers]
            if block.title:
                parts.append(f"**{_escaped(block.title)}**")
            parts.append("\n".join(tables.markdown(headers, rows, block.left)))
        else:
            parts.append(f"*Plot, in report.html:* {_escaped(block.title)}. {_escaped(block.alt)}")
    return "\n\n".join(parts) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The report as an HTML page with everything in it."""
    parts, plots, contents = [], [], []
    numbers = iter(range(len(blocks)))
    for block in [*blocks, Text("")]:
        if isinstance(block, Plot):
            plots.append(_plot(block, f"p{next(numbers)}"))
            continue
        if plots:
            parts.append('<div class="plots">\n' + "\n".join(plots) + "\n</div>")
            plots = []
        if isinstance(block, Heading):
            name = f"h{next(numbers)}"
            parts.append(f'<h{block.level} id="{name}">{_html(block.text)}</h{block.level}>')
            if block.level == 2:
                contents.append(f'<a href="#{name}">{_html(block.text)}</a>')
        elif isinstance(block, Table):
            parts.append(_table(block))
        elif block.text:
            link = f' <a href="{_html(block.link)}">{_html(block.link)}</a>' if block.link else ""
            parts.append(f"<p>{_html(block.text)}{link}</p>")
    return f"""<!doctype html>
{MARK}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{_html(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<nav aria-label="Contents">
{chr(10).join(contents)}
</nav>
<main>
{chr(10).join(parts)}
</main>
</body>
</html>
"""


def printable(text: str) -> str:
    """A text in one line that cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _table(table: Table) -> str:
    def cell(tag: str, text: str, column: int, scope: str) -> str:
        kind = "long" if len(text) > _LONG else "word" if column < table.left else ""
        return f"<{tag}{scope}" + f' class="{kind}"' * bool(kind) + f">{_html(text)}</{tag}>"

    head = "".join(cell("th", h, i, ' scope="col"') for i, h in enumerate(table.headers))
    body = "\n".join(
        "<tr>"
        + cell("th", row[0], 0, ' scope="row"')
        + "".join(cell("td", text, i, "") for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{_html(table.title)}</caption>\n" if table.title else ""
    label = _html(table.title or table.headers[0])
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">\n<table>\n'
        f"{caption}<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _plot(plot: Plot, prefix: str) -> str:
    # Every drawing numbers its parts alike; on one page they must differ.
    names: dict[str, str] = {}
    for name in re.findall(r'\bid="([^"]+)"', plot.svg):
        names.setdefault(name, f"{prefix}-{len(names)}")

    def renamed(match: re.Match[str]) -> str:
        return match[1] + names.get(match[2], match[2]) + match[3]

    svg = re.sub(r'(\bid=")([^"]+)(")', renamed, plot.svg)
    svg = re.sub(r'(href="#)([^"]+)(")', renamed, svg)
    svg = re.sub(r"(url\(#)([^)]+)(\))", renamed, svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_html(plot.alt)}" ', 1)
    return f"<figure>\n<figcaption>{_html(plot.title)}</figcaption>\n{svg.strip()}\n</figure>"


def _html(text: str) -> str:
    return html.escape(printable(text))


def _escaped(text: str) -> str:
    """With a backslash before what Markdown would take for more than text."""
    return re.sub(r"([\\`*<>&~$]|(?<=\])\(|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))
