"""The look of a report's plots: SVG that takes the page's own text colour.

Colours are those of Okabe and Ito that are seen on white and on black; a marker, a line style or a
hatch tells apart what the colour does.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from infobatch_fast.report.groups import Section
from infobatch_fast.report.methods import method_of

TEXT = "#010203"  # stands for the page's text colour until `svg`
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", TEXT)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
WIDTH = 6.4  # inches
_LINE = 36  # characters of a label
_MOST_NAMED = 12  # runs that an alternative text tells of


def labels_of(section: Section) -> dict[str, str]:
    """What a run's line is called, by its letter: as its row in the tables."""
    labels = {run.letter: method_of(run).label for run in section.runs}
    return labels | {run.letter: row.label for row in section.rows for run in row.runs}


def wrapped(label: str, names: Sequence[str]) -> str:
    """A label with its runs' letters, in lines short enough for half a plot's width."""
    return "\n".join(textwrap.wrap(f"{label}: {', '.join(names)}", _LINE))


def legend(figure: Figure, entries: Mapping[str, tuple[Line2D, Sequence[str]]]) -> None:
    """Put a legend below a figure's one plot, and make room for it.

    Args:
        figure: as `one_plot` gave it.
        entries: by label, the line and the names that it stands for.
    """
    columns = min(2, len(entries))
    texts = [wrapped(label, names) for label, (_, names) in entries.items()]
    rows = -(-len(texts) // columns)  # matplotlib fills the columns one by one
    lines = [max(1 + text.count("\n") for text in texts[row::rows]) for row in range(rows)]
    figure.set_figheight(figure.get_figheight() + 0.07 * rows + 0.14 * sum(lines))
    drawn = figure.legend(
        [line for line, _ in entries.values()],
        texts,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        labelcolor=TEXT,
        handlelength=3.4,
        fontsize=8,
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


def some(told: Sequence[str]) -> str:
    """The first of what there is to tell, and how much more there is."""
    more = f"; and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else ""
    return "; ".join(told[:_MOST_NAMED]) + more


def one_plot(height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one plot in it."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Axes, *, grid: bool = True) -> None:
    """Give a plot the look of all, in the page's text colour."""
    axes.patch.set_visible(False)
    axes.tick_params(which="both", colors=TEXT, labelsize=8)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT)
    if grid:
        axes.grid(color=TEXT, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)


def svg(figure: Figure) -> str:
    """The drawing alone: no XML header, no metadata, no style sheet for the page it stands in."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, dpi=144, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    start, stop = text.index("<style"), text.index("</style>") + len("</style>")
    return (text[:start] + text[stop:]).replace(TEXT, "currentColor")
