"""What pruning did to the samples of some runs: images, classes and scores."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from infobatch_fast.report.drawing import (
    COLOURS,
    LINES,
    MARKERS,
    TEXT,
    WIDTH,
    labels_of,
    legend,
    one_plot,
    some,
    svg,
)
from infobatch_fast.report.groups import Section, counted
from infobatch_fast.report.methods import FULL, method_of
from infobatch_fast.report.page import Block, Heading, Plot, Text
from infobatch_fast.report.records import NOTHING, Run, Sample
from infobatch_fast.report.saving import saving

TITLE = "What pruning did to the samples"
_MOST_RUNS = 8
_MOST_CLASSES = 20  # of more, the ten that lost most and the ten that lost least
_COLUMNS, _CELL = 6, (1.08, 1.55)  # of images, and the room of each in its widths
_NAME = 16  # characters of a class's name


def samples(found: Sequence[Section]) -> list[Block]:
    """Images, classes and scores of some runs, and the saving of all; nothing where none has them.

    Args:
        found: the sections of a report.
    """
    drawn = _drawn(found)
    blocks: list[Block] = []
    for section in found:
        runs = [run for run in section.runs if run.letter in drawn]
        parts = [block for run in runs for block in _of_run(run, labels_of(section)[run.letter])]
        parts += saving(section, drawn)
        if parts:
            blocks += [Heading(section.title, 3), *parts]
    left = [run.letter for s in found for run in s.runs if _shown(run) and run.letter not in drawn]
    if left:
        blocks.append(
            Text(
                f"Left out: the plots of {counted(len(left), 'further run')}, {', '.join(left)}. "
                f"Those of {_MOST_RUNS} are drawn, of each training the first ones."
            )
        )
    return [Heading(TITLE, 2), *blocks] if blocks else []


def _shown(run: Run) -> bool:
    return run.inside is not NOTHING or (method_of(run) != FULL and run.expected_share is not None)


def _drawn(found: Sequence[Section]) -> set[str]:
    """Letters of the runs to draw: the first of each training, then the second, and so on.

    Those that pruned nothing come last.
    """
    turns: list[tuple[bool, int, str]] = []
    for section in found:
        labels = labels_of(section)
        so_far: dict[str, int] = {}
        for run in section.runs:
            if _shown(run):
                label = labels[run.letter]
                so_far[label] = so_far.get(label, 0) + 1
                turns.append((method_of(run) == FULL, so_far[label], run.letter))
    return {letter for *_, letter in sorted(turns, key=lambda turn: turn[:2])[:_MOST_RUNS]}


def _of_run(run: Run, label: str) -> list[Block]:
    """The plots of one run."""
    name = f"{run.letter}, {label}"
    blocks: list[Block] = []
    if run.inside.least or run.inside.most:
        blocks.append(_images(run, name))
    if run.inside.classes:
        blocks.append(_classes(run, name))
    if run.inside.tracked:
        blocks.append(_scores(run, name))
    return blocks


def _images(run: Run, name: str) -> Plot:
    """The images of the samples that were kept least, above those kept most often."""
    inside = run.inside
    groups = [
        (f"Pruned {which}: the {counted(len(group), 'sample')} kept {how}", group)
        for which, how, group in (
            ("most", "least", inside.least),
            ("least", "most often", inside.most),
        )
        if group
    ]
    rows = [-(-len(group) // _COLUMNS) for _, group in groups]
    figure = Figure(figsize=(WIDTH, sum(0.3 + 1.5 * row for row in rows)), layout="constrained")
    grid = figure.subplots(len(groups), 1, height_ratios=rows, squeeze=False).flat
    for axes, (title, group), height in zip(grid, groups, rows, strict=True):
        axes.set_title(title, fontsize=9, color=TEXT)
        for place, sample in enumerate(group):
            # An image is 1 wide; its words stand above it, in the rest of its cell.
            x, y = place % _COLUMNS * _CELL[0], place // _COLUMNS * _CELL[1]
            axes.imshow(sample.data, interpolation="none", extent=(x, x + 1, y, y - 1))
            words = {"ha": "center", "va": "bottom", "fontsize": 7, "color": TEXT}
            axes.text(x + 0.5, y - 1.05, _caption(run, sample), parse_math=False, **words)
        axes.set_xlim(0, _COLUMNS * _CELL[0])
        axes.set_ylim(height * _CELL[1] - 1.4, -1.5)
        axes.set_axis_off()
    told = [
        f"{which}: " + ", ".join(_called(run, sample) for sample in group)
        for which, group in (("pruned most", inside.least), ("pruned least", inside.most))
    ]
    alt = f"Training images with class, epochs that kept them, and last score. {'; '.join(told)}."
    return Plot(svg(figure), f"Images pruned most and least: {name}", alt)


def _caption(run: Run, sample: Sample) -> str:
    of = f"kept {sample.kept} of {run.config['epochs']}"
    return f"{_class(run, sample.label)}\n{of}\nscore {_score(sample.score)}"


def _score(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "none"


def _called(run: Run, sample: Sample) -> str:
    of = f"kept {sample.kept} of {run.config['epochs']}"
    return f"{run.class_name(sample.label)} {sample.number} {of}"


def _class(run: Run, label: int) -> str:
    """A class's name as it can be drawn: the font need not have all of Unicode."""
    name = run.class_name(label).encode("ascii", "replace").decode()
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."


def _classes(run: Run, name: str) -> Plot:
    """A bar for each class, or for those at either end."""
    shares = sorted(run.inside.classes.items(), key=lambda item: (-item[1], item[0]))
    title = f"Saving by class: {name}"
    which = "A bar for each class"
    if len(shares) > _MOST_CLASSES:
        half = _MOST_CLASSES // 2
        which = f"A bar for the {half} classes saved most and the {half} saved least of "
        which += str(len(shares))
        title += f" ({half} most and {half} least of {len(shares)})"
        shares = shares[:half] + shares[-half:]
    percents = [100 * share for _, share in shares]
    figure, axes = one_plot(1.0 + 0.22 * len(shares))
    places = np.arange(len(shares))
    axes.barh(places, percents, height=0.7, color=COLOURS[0], edgecolor=TEXT, linewidth=0.6)
    names = [f"{_class(run, label)}  {100 * share:.1f}" for label, share in shares]
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    overall = 100 * (run.saved_share or 0.0)
    axes.axvline(overall, color=TEXT, linestyle="--", linewidth=1)
    axes.annotate(
        f"all {overall:.1f}",
        (overall, 1),
        (3, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=8,
        color=TEXT,
    )
    axes.set_xlim(0, 1.04 * max(*percents, overall) or 1.0)
    axes.set_xlabel("left out (% of the class's samples times epochs)")
    told = ", ".join(f"{run.class_name(label)} {100 * share:.1f}" for label, share in shares)
    alt = f"{which}, in % of its samples times epochs: {told}. All classes: {overall:.1f}."
    return Plot(svg(figure), title, alt)


def _scores(run: Run, name: str) -> Plot:
    """A line for each of the chosen samples."""
    chosen = run.inside.tracked
    figure, axes = one_plot(3.4)
    entries: dict[str, tuple[Line2D, list[str]]] = {}
    values = np.stack([sample.data for sample in chosen])
    values = np.where(np.isfinite(values), values, np.nan)
    for number, (sample, scores) in enumerate(zip(chosen, values, strict=True)):
        (line,) = axes.plot(
            np.arange(1, len(scores) + 1),
            scores,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.3,
            markevery=max(1, len(scores) // 8),
        )
        of = f"{_class(run, sample.label)} {sample.number}"
        entries[of] = line, [f"kept {sample.kept} of {len(scores)}"]
    if np.isfinite(values).any() and 0 < 10 * np.nanmin(values) < np.nanmax(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda score, _: f"{score:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"score ({run.config.get('score', 'loss')})")
    legend(figure, entries)
    told = [f"{_called(run, s)}: {_score(s.data[0])} to {_score(s.data[-1])}" for s in chosen]
    alt = (
        "Scores after each epoch of some of the tracked samples, from those kept least to those "
        f"kept most often. {some(told)}."
    )
    return Plot(svg(figure), f"Scores of single samples: {name}", alt)
