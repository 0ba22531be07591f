"""What each epoch was expected to leave out, and what it did."""

from collections.abc import Sequence

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from infobatch_fast.report.drawing import (
    COLOURS,
    LINES,
    MARKERS,
    labels_of,
    legend,
    one_plot,
    some,
    svg,
)
from infobatch_fast.report.groups import Section
from infobatch_fast.report.methods import FULL, method_of
from infobatch_fast.report.page import Block, Plot, Table, Text
from infobatch_fast.report.records import Run
from infobatch_fast.report.tables import NONE


def saving(section: Section, drawn: set[str]) -> list[Block]:
    """A plot and a table of the runs that prune; nothing where it was not recorded.

    Args:
        section: whose runs they are.
        drawn: letters of those in the plot; the table has all.
    """
    known = [
        run
        for run in section.runs
        if method_of(run) != FULL and run.expected_share is not None and run.samples is not None
    ]
    if not known:
        return []
    labels = labels_of(section)
    cells = []
    for run in known:
        expected, realised = 100 * (run.expected_share or 0.0), 100 * (run.saved_share or 0.0)
        target = run.config.get("target_saving")
        cells.append(
            [
                run.letter if run.complete else f"{run.letter} (incomplete)",
                labels[run.letter],
                f"{expected:.2f}",
                f"{realised:.2f}",
                f"{round(realised - expected, 3) + 0.0:+.3f}",  # no -0.000
                NONE if target is None else f"{100 * target:.2f}",
            ]
        )
    headers = ["run", "training", "expected %", "realised %", "difference (points)", "target %"]
    blocks: list[Block] = []
    shown = [run for run in known if run.letter in drawn]
    if shown:
        blocks.append(_curves(shown, labels))
    return [
        *blocks,
        Table("Expected and realised saving", headers, cells, left=2),
        Text(
            "Share of all samples of the epochs that was left out. Expected: from the scores that "
            "each epoch began with, by the rule of its policy, before it was rounded to whole "
            "samples and batches."
        ),
    ]


def _curves(runs: Sequence[Run], labels: dict[str, str]) -> Plot:
    """The saving that was expected as a line, and the realised one as markers."""
    styles = {label: number for number, label in enumerate(dict.fromkeys(labels.values()))}
    figure, axes = one_plot(3.4)
    entries: dict[str, tuple[Line2D, list[str]]] = {}
    told = []
    for run in runs:
        label = labels[run.letter]
        number = styles[label]
        epochs = [line["epoch"] for line in run.epochs]
        expected = [100 * line["expected_saving"] for line in run.epochs]
        realised = [100 * (1 - line["kept"] / (run.samples or 1)) for line in run.epochs]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        style = LINES[number % len(LINES)]
        axes.plot(epochs, expected, color=colour, linestyle=style, linewidth=1.3)
        axes.plot(
            epochs,
            realised,
            color=colour,
            linestyle="none",
            marker=marker,
            markersize=4,
            markevery=max(1, len(epochs) // 25),
        )
        handle = Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=4)
        entries.setdefault(label, (handle, []))[1].append(run.letter)
        most = max(realised)
        told.append(f"{run.letter} leaves out {most:.4g} at most, {max(expected):.4g} expected")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("left out (% of all samples)")
    legend(figure, entries)
    alt = f"For each run a line, expected, and markers, realised, in % over epochs. {some(told)}."
    title = "Expected (lines) and realised (markers) saving of each epoch"
    return Plot(svg(figure), title, alt)
