"""The plots of one setting's runs."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
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
    plain,
    some,
    svg,
    wrapped,
)
from infobatch_fast.report.groups import Section, counted
from infobatch_fast.report.page import Block, Plot, Text
from infobatch_fast.report.records import Run, training_seconds

_BARS = (*COLOURS[:-1], "#999999")  # hatched in the text colour
_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++")
_MOST_HISTOGRAMS = 12


def plots(section: Section) -> list[Block]:
    """Everything that there is to draw of a section's runs; a text where there is nothing."""
    trained = [run for run in section.runs if run.epochs]
    if not trained:
        return [Text("No plots: no epoch is finished.")]
    blocks: list[Block] = []
    evaluated = [run for run in trained if _accuracy(run)]
    if evaluated:
        blocks += [
            _lines(
                section,
                evaluated,
                _minutes,
                _accuracy,
                ("Test accuracy against time", "training time (minutes)", "test accuracy (%)"),
            ),
            _lines(
                section,
                evaluated,
                _samples,
                _accuracy,
                (
                    "Test accuracy against samples",
                    "samples trained on (millions)",
                    "test accuracy (%)",
                ),
            ),
        ]
    else:
        blocks.append(Text("No plot of the accuracy: no epoch was evaluated."))
    known = [run for run in trained if run.samples is not None]
    if known:
        blocks.append(
            _lines(
                section,
                known,
                lambda run: [line["epoch"] for line in run.epochs],
                lambda run: [100 * line["kept"] / (run.samples or 1) for line in run.epochs],
                ("Samples kept in each epoch", "epoch", "samples kept (%)"),
            )
        )
    blocks += _phases(section, trained)
    blocks += _energy(section, trained)
    blocks += _histograms(section, trained)
    return blocks


def _minutes(run: Run) -> list[float]:
    took = accumulate(training_seconds(line) for line in run.unbroken)
    return [t / 60 for t, line in _evaluated(run, took)]


def _samples(run: Run) -> list[float]:
    kept = accumulate(line["kept"] for line in run.unbroken)
    return [k / 1e6 for k, line in _evaluated(run, kept)]


def _accuracy(run: Run) -> list[float]:
    return [100 * line["accuracy"] for _, line in _evaluated(run, run.unbroken)]


def _evaluated(run: Run, values: Iterable[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Of a value for each epoch those of the evaluated ones, with the epochs' lines."""
    pairs = zip(values, run.unbroken, strict=True)
    return [(value, line) for value, line in pairs if line["accuracy"] is not None]


def _lines(
    section: Section,
    runs: Sequence[Run],
    x: Callable[[Run], list[float]],
    y: Callable[[Run], list[float]],
    words: tuple[str, str, str],
) -> Plot:
    """A line for each run; the runs of one training look alike.

    Args:
        section: whose runs they are.
        runs: drawn, in the order of the legend.
        x: of each point of a run.
        y: as many.
        words: title, and the labels of the axes with their units.
    """
    title, x_label, y_label = words
    labels = labels_of(section)
    styles = {label: number for number, label in enumerate(dict.fromkeys(labels.values()))}
    entries: dict[str, tuple[Any, list[str]]] = {}
    figure, axes = one_plot(3.4)
    ends = []
    for run in runs:
        label = labels[run.letter]
        number = styles[label]
        xs, ys = x(run), y(run)
        (line,) = axes.plot(
            xs,
            ys,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.3,
            # The last point has its marker; the others' are thinned out.
            markevery=[*range(0, len(xs) - 1, max(1, len(xs) // 8)), len(xs) - 1],
        )
        name = run.letter if run.complete else f"{run.letter} (incomplete)"
        entries.setdefault(label, (line, []))[1].append(name)
        ends.append(f"{run.letter} ends at {ys[-1]:.4g} after {xs[-1]:.4g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if x_label == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, entries)
    alt = f"A line for each run; {y_label} over {x_label}. {some(ends)}."
    return Plot(svg(figure), title, alt)


def _phases(section: Section, runs: Sequence[Run]) -> list[Block]:
    known = [run for run in runs if run.phases]
    blocks: list[Block] = []
    if known:
        names = list(dict.fromkeys(name for run in known for name in run.phases or {}))
        parts = {name: [(run.phases or {}).get(name, 0.0) for run in known] for name in names}
        blocks.append(
            _bars(section, known, parts, ("Time by phase", "time (s)"), lambda v: f"{v:.4g} s")
        )
    missing = [run.letter for run in runs if not run.phases]
    if missing:
        blocks.append(Text(f"No time by phase of {', '.join(missing)}: it was not recorded."))
    return blocks


def _energy(section: Section, runs: Sequence[Run]) -> list[Block]:
    known = [run for run in runs if run.figure("joules") is not None]
    blocks: list[Block] = []
    if known:
        train = [run.figure("train_joules") or 0.0 for run in known]
        rest = [
            max(0.0, (run.figure("joules") or 0.0) - t) for run, t in zip(known, train, strict=True)
        ]
        saved = [max(0.0, run.figure("joules_saved") or 0.0) for run in known]
        parts = {
            "training": [joules / 1000 for joules in train],
            "evaluation, checkpoints and the rest": [joules / 1000 for joules in rest],
            "saved by pruning (estimate)": [joules / 1000 for joules in saved],
        }
        words = ("Energy", "energy (kJ)")
        blocks.append(_bars(section, known, parts, words, lambda v: f"{v:.4g} kJ", hollow=2))
        blocks.append(
            Text(
                "The energy saved is an estimate: the samples left out, at the joules that the "
                "same run took for each sample it trained on."
            )
        )
    reasons: dict[str, list[str]] = {}
    for run in runs:
        if run.figure("joules") is None:
            reasons.setdefault(run.no_energy(), []).append(run.letter)
    blocks += [Text(f"No energy of {', '.join(of)}: {why}.") for why, of in reasons.items()]
    return blocks


def _bars(
    section: Section,
    runs: Sequence[Run],
    parts: dict[str, list[float]],
    words: tuple[str, str],
    say: Callable[[float], str],
    hollow: int | None = None,
) -> Plot:
    """A bar for each run, stacked of parts; the one numbered `hollow` is not there, but spared."""
    title, label = words
    labels = labels_of(section)
    names = [wrapped(labels[run.letter], [run.letter]) for run in runs]
    tall = max(0.3, 0.15 * max(1 + name.count("\n") for name in names))
    figure, axes = one_plot(1.5 + tall * len(runs) + 0.22 * -(-len(parts) // 3))
    places = np.arange(len(runs))
    left = np.zeros(len(runs))
    for number, (name, values) in enumerate(parts.items()):
        colour = _BARS[number % len(_BARS)]
        spared = number == hollow
        axes.barh(
            places,
            values,
            left=left,
            height=0.7,
            color="none" if spared else colour,
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor=TEXT,
            linestyle="--" if spared else "-",
            linewidth=0.6,
            label=name,
        )
        left += values
    axes.set_yticks(places, names)
    axes.set_ylim(len(runs) - 0.5, -0.5)  # the first on top
    axes.set_xlim(0, 1.04 * left.max() or 1.0)
    axes.set_xlabel(label)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, labelcolor=TEXT, fontsize=8)
    told = [
        f"{run.letter}: " + ", ".join(f"{name} {say(values[i])}" for name, values in parts.items())
        for i, run in enumerate(runs)
    ]
    return Plot(svg(figure), title, f"A bar for each run, in {label}. {some(told)}.")


def _histograms(section: Section, runs: Sequence[Run]) -> list[Block]:
    known = [run for run in runs if any(line.get("score_histogram") for line in run.epochs)]
    if not known:
        return [Text("No plot of the scores: no histogram was recorded.")]
    # The first of each training, then the others.
    labels = labels_of(section)
    firsts = {labels[run.letter]: run.letter for run in reversed(known)}.values()
    ranked = sorted(known, key=lambda run: run.letter not in firsts)
    chosen = {run.letter for run in ranked[:_MOST_HISTOGRAMS]}
    shown = [run for run in known if run.letter in chosen]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 1.0 + 2.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    tables = {run.letter: _shares(run) for run in shown}
    most = max(np.nanmax(shares) for _, shares in tables.values()) or 1.0
    reach = [_reach(*table) for table in tables.values()]
    colours = ScalarMappable(Normalize(0, most), "cividis")
    for axes, run in zip(grid.flat, shown, strict=False):
        edges, shares = tables[run.letter]
        axes.pcolormesh(
            np.arange(shares.shape[1] + 1) + 0.5,
            edges,
            shares,
            norm=colours.norm,
            cmap=colours.cmap,
            rasterized=True,
        )
        axes.set_yscale("log")
        axes.set_ylim(min(low for low, _ in reach), max(high for _, high in reach))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda score, _: f"{score:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(wrapped(labels[run.letter], [run.letter]), fontsize=9, color=TEXT)
        plain(axes, grid=False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("epoch", fontsize=10, color=TEXT)
    by_loss = all(run.config.get("score", "loss") == "loss" for run in shown)
    figure.supylabel("score (last loss)" if by_loss else "score", fontsize=10, color=TEXT)
    bar = figure.colorbar(colours, ax=list(grid.flat), label="samples (%)")
    bar.ax.yaxis.label.set_color(TEXT)
    bar.ax.tick_params(colors=TEXT, labelsize=8)
    which = f"each of {len(shown)} runs"
    if len(known) > len(shown):
        which = f"{len(shown)} of the {counted(len(known), 'run')} with histograms"
    elif len(shown) == 1:
        which = f"run {shown[0].letter}"
    alt = (
        f"A heat map for {which}: epochs across, "
        "scores upwards on a logarithmic axis, and the share of the scored samples as colour, "
        "from dark (none) to bright. Scores beyond the recorded bins count in the outermost."
    )
    blocks: list[Block] = [Plot(svg(figure), "Scores over the epochs", alt)]
    if left := [run.letter for run in known if run.letter not in chosen]:
        blocks.append(Text(f"Left out of the scores: {', '.join(left)}."))
    return blocks


def _shares(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Edges (bins + 1,) of the scores' bins, and percent of the scored samples (bins, epochs).

    The outermost bins are those of what lies beyond; an epoch without histogram is NaN.
    """
    histograms = {line["epoch"]: line.get("score_histogram") for line in run.epochs}
    one = next(h for h in histograms.values() if h)
    bins = len(one["counts"])
    low, high = np.log10(one["low"]), np.log10(one["high"])
    step = (high - low) / (bins - 2)
    edges = 10 ** np.linspace(low - step, high + step, bins + 1)
    shares = np.full((bins, max(histograms)), np.nan)
    for epoch, histogram in histograms.items():
        if histogram:
            counts = np.asarray(histogram["counts"], dtype=float)
            shares[:, epoch - 1] = 100 * counts / max(1.0, counts.sum())
    return edges, shares


def _reach(edges: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest edge of the bins that hold scores."""
    filled = np.flatnonzero(np.nansum(shares, axis=1))
    low, high = (filled[0], filled[-1] + 1) if len(filled) else (0, -1)
    return float(edges[low]), float(edges[high])
