"""A report's plots: SVG in the page's own text colour, so that it suits light and dark."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from infobatch_fast.errors import reason
from infobatch_fast.pruning import FULL
from infobatch_fast.report.page import Block, Heading, Plot, Text
from infobatch_fast.report.paired import Training, trainings
from infobatch_fast.report.runs import Run, Section
from infobatch_fast.report.text import counted

_TEXT = "#010203"  # stands for the page's text colour until `_svg`
# Near those of Okabe and Ito, all seen on white and on black; line styles tell apart as well.
_COLOURS = ["#2F8FD6", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c7ae6", _TEXT]
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(linestyle=["-", "--", "-."]) * cycler(color=_COLOURS),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _TEXT),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _TEXT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.grid": True, "grid.alpha": 0.15, "axes.axisbelow": True, "lines.linewidth": 1.5},
    **{"font.size": 9, "legend.fontsize": 8, "legend.handlelength": 2.6, "text.parse_math": False},
    **{"figure.figsize": (6.4, 3.6), "figure.constrained_layout.use": True},
    **{"svg.fonttype": "none", "font.family": "sans-serif", "savefig.transparent": True},
}
_MOST_TRAININGS = 16
_MOST_INSIDE = 4  # runs
_MOST_CLASSES = 20
_PICTURES = 8  # a row
_numbers = count()


def plots(section: Section) -> list[Block]:
    """Accuracy, what was kept, and time by training; then what pruning did to the samples."""
    whole = trainings(section)
    grouped = {of.label: [*of.runs] for of in whole}
    for run in section.runs:
        if run.epochs and not run.complete:
            grouped.setdefault(section.label(run), []).append(run)
    blocks: list[Block] = []
    left = len(grouped) - _MOST_TRAININGS
    if left > 0:
        told = f"The plots leave out {counted(left, 'further training')}: name fewer runs."
        blocks.append(Text(told, "aside"))
        grouped = dict([*grouped.items()][:_MOST_TRAININGS])
    if len(whole) > 1:
        _ends(whole[:_MOST_TRAININGS], blocks)
    if grouped:
        _lines(grouped, "accuracy", "Accuracy by epoch", blocks)
        _lines(grouped, "kept", "Samples kept in each epoch", blocks)
        _phases(grouped, blocks)
    return blocks + _inside(grouped)


def _inside(grouped: dict[str, list[Run]]) -> list[Block]:
    """What pruning did to the samples, by the first run of each training that tells."""
    firsts = {}
    for label, runs in grouped.items():
        of = [r for r in runs if (r.folder / "kept.npy").exists() or r.epochs[-1].score_histogram]
        if of and of[0].pruning != FULL and len(firsts) < _MOST_INSIDE:
            firsts[label] = of[0]
    if not firsts:
        return []
    told = ", ".join(run.name for run in firsts.values())
    about = f"By the first run of each training, of {_MOST_INSIDE} at most: {told}."
    blocks: list[Block] = [Heading("What pruning did to the samples", 2), Text(about, "aside")]
    for label, run in firsts.items():
        _histogram(run, label, blocks)
        try:
            found = {
                name: np.load(run.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("kept", "scores", "labels", "pictured", "pictures")
            }
        except FileNotFoundError:  # of a run that has not ended
            continue
        except Exception as error:  # a damaged header fails in many ways
            blocks.append(Text(f"The .npy files of {run.name} cannot be read: {reason(error)}."))
            continue
        _classes(run, label, found, blocks)
        _pictures(run, label, found, blocks)
    return blocks


def _ends(whole: Sequence[Training], blocks: list[Block]) -> None:
    """Where each run ended; the line through full data is what pruning has to be above."""
    about = "The end of each run, larger the mean. The line joins full data, whole and shorter."
    with _figure("Last accuracy by samples trained on", about, blocks) as figure:
        axes = figure.add_subplot(xlabel="samples trained on (millions)", ylabel="accuracy (%)")
        marks = "os^DvPX"  # seven, so that no pair of colour and mark repeats
        full = pd.DataFrame([t.frame.mean(numeric_only=True) for t in whole if t.pruning == FULL])
        if len(full):
            full = full.sort_values("trained")
            axes.plot(full["trained"] / 1e6, full["accuracy"], "-", color=_TEXT, linewidth=1)
        for number, of in enumerate(whole):
            colour, mark = _COLOURS[number % len(_COLOURS)], marks[number % len(marks)]
            x, y = of.frame["trained"] / 1e6, of.frame["accuracy"]
            axes.plot(x, y, mark, color=colour, markersize=3, alpha=0.6)
            axes.plot([x.mean()], [y.mean()], mark, color=colour, markersize=7, label=of.label)


def _lines(grouped: dict[str, list[Run]], y: str, title: str, blocks: list[Block]) -> None:
    """By epoch the means of a training's complete runs, or of all where none is."""
    floors = []
    with _figure(title, "Means over seeds; the last point is marked.", blocks) as figure:
        axes = figure.add_subplot(xlabel="epoch", ylabel=f"{y} (%)")
        for name, runs in grouped.items():
            rows = [
                (line.epoch, 100 * (line.kept / run.size if y == "kept" else line.accuracy or 0))
                for run in [run for run in runs if run.complete] or runs
                for line in run.epochs
                if y == "kept" or line.accuracy is not None
            ]
            means = pd.DataFrame(rows, columns=pd.Index(["epoch", y])).groupby("epoch")[y].mean()
            (line,) = axes.plot(means.index, means, label=name)
            axes.plot(means.index[-1:], means.tail(1), "o", color=line.get_color(), ms=4)
            floors += [means.iloc[len(means) // 4]] if len(means) > 4 else []
        if floors and y == "accuracy":  # the first epochs are far below; the end is what is read
            axes.set_ylim(bottom=min(floors))


def _bars(axes: Axes, frame: pd.DataFrame) -> None:
    """A bar for each row, from the top down, stacked of the columns."""
    start = np.zeros(len(frame))
    for name in frame:
        axes.barh(range(len(frame)), frame[name], left=start, label=name, height=0.7)
        start += frame[name].to_numpy()
    axes.set_yticks(range(len(frame)), [*map(str, frame.index)])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _phases(grouped: dict[str, list[Run]], blocks: list[Block]) -> None:
    known = {
        name: pd.DataFrame([line.phases for run in runs for line in run.epochs if line.phases])
        for name, runs in grouped.items()
    }
    frame = pd.DataFrame({name: of.fillna(0.0).mean() for name, of in known.items() if len(of)}).T
    about = "Wall time of an epoch, mean over all; comparable on one idle device alone."
    if len(frame):
        with _figure("Time by phase", about, blocks, 1.0 + 0.25 * len(frame)) as figure:
            axes = figure.add_subplot(xlabel="seconds an epoch")
            _bars(axes, frame.fillna(0.0))


def _histogram(run: Run, label: str, blocks: list[Block]) -> None:
    known = [line for line in run.epochs if line.score_histogram]
    if not known:
        return
    picked = [known[i] for i in sorted({0, len(known) // 3, 2 * len(known) // 3, len(known) - 1})]
    about = f"Score ({run.pruning.score}) of all samples that have one."
    with _figure(f"Scores: {label}", about, blocks) as figure:
        axes = figure.add_subplot(xlabel="score", ylabel="samples (%)", xscale="log")
        for line, colour in zip(picked, _COLOURS, strict=False):
            of = line.score_histogram or {}
            counts = np.array(of["counts"][1:-1])
            edges = np.geomspace(of["low"], of["high"], len(counts) + 1)
            held = slice(*(np.flatnonzero(counts)[[0, -1]] + [0, 1])) if counts.any() else slice(0)
            shares = 100 * counts[held] / max(1, sum(of["counts"]) + of["unseen"])
            label = f"epoch {line.epoch}"
            axes.stairs(shares, edges[held.start or 0 : held.stop + 1], label=label, ec=colour)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _classes(run: Run, label: str, found: dict[str, np.ndarray], blocks: list[Block]) -> None:
    epochs = len(run.epochs)
    frame = pd.DataFrame({"label": found["labels"], "out": 100 * (1 - found["kept"] / epochs)})
    shares = frame.groupby("label")["out"].mean().sort_values(ascending=False)
    about = "Share of the class's samples, over all epochs; dotted, of all classes. The first "
    about += f"{_MOST_CLASSES} of {len(shares)}." if len(shares) > _MOST_CLASSES else "is the most."
    shares = shares.head(_MOST_CLASSES)
    with _figure(f"Left out by class: {label}", about, blocks, 0.8 + 0.22 * len(shares)) as figure:
        axes = figure.add_subplot(xlabel="left out (%)")
        # What begins with "_" has no legend.
        _bars(axes, shares.rename(lambda number: _class(run, number)).to_frame("_"))
        axes.axvline(100 * (run.saved_share or 0.0), color=_TEXT, linestyle=":")


def _pictures(run: Run, label: str, found: dict[str, np.ndarray], blocks: list[Block]) -> None:
    half = len(found["pictured"]) // 2
    few = min(half, _PICTURES)
    about = "Above those kept least, below those kept most: class, epochs that trained on it of "
    about += f"{len(run.epochs)}, and last score."
    with _figure(f"Kept least and most: {label}", about, blocks, 2.7) as figure:
        grid = figure.subplots(2, _PICTURES)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, at in zip(
            grid[:, :few].flat, [*range(few), *range(half, half + few)], strict=True
        ):
            number = found["pictured"][at]
            name = _class(run, int(found["labels"][number]))
            axes.imshow(found["pictures"][at], interpolation="nearest")
            told = f"{name}\n{found['kept'][number]}, {found['scores'][number]:.2g}"
            axes.set_title(told, fontsize=7)


def _class(run: Run, label: int) -> str:
    name = run.record.classes[label] if run.record.classes else f"class {label}"
    return name if len(name) <= 16 else f"{name[:15]}…"


@contextmanager
def _figure(
    title: str, about: str, blocks: list[Block], height: float | None = None
) -> Iterator[Figure]:
    """A figure to draw on, which then is a plot among the blocks, its legend below it."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": str(next(_numbers))}):
        figure = Figure()
        if height is not None:
            figure.set_figheight(height)
        yield figure
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if labels:
            columns = 2 if max(map(len, labels)) < 40 else 1
            figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(labels) // columns))
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        blocks.append(Plot(title, _svg(figure), about))


def _svg(figure: Figure) -> Markup:
    """The drawing alone: no header, no metadata, and no names but those it refers to."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings(action="ignore"):  # of letters that the reader's fonts may have
        figure.savefig(buffer, format="svg", dpi=144, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg ") :].replace(_TEXT, "currentColor")
    used = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    return Markup(re.sub(r' id="([^"]+)"', lambda id: id[0] if id[1] in used else "", text))
