"""The plot that `throughput.py` makes of its rows."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness as measure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from throughput_tables import COPYING
from training_rows import epoch_name

from infobatch_fast.report.text import figures
from infobatch_fast.train.records import write_atomically

# Okabe and Ito's, which colour-blind readers tell apart; markers serve those without any colour.
SIZES = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#D55E00", "v"),
    ("#56B4E9", "P"),
)
FULL, PRUNED = ("#0072B2", "o"), ("#E69F00", "s")
ALONE, LOADER, DATASET = ("#000000", "D"), ("#D55E00", "^"), ("#56B4E9", "*")

Line = Mapping[str, Any]


def draw(lines: Sequence[Line], path: Path) -> bool:
    """Draw the rows that have figures, as a PNG.

    Args:
        lines: of a benchmark's file.
        path: of the PNG.

    Returns:
        Whether there was a row to draw.

    Raises:
        UserError: it cannot be written.
    """
    rows = [line for line in lines if line["absent"] is None]
    loaders = [line for line in rows if line["part"] == "loaders"]
    training = [line for line in rows if line["part"] == "training"]
    sizes = sorted({line["case"]["batch_size"] for line in loaders})
    sides = list(dict.fromkeys(line["case"]["side"] for line in loaders))
    heights = [1.6 + 0.19 * len(sides) * max(2, len(sizes)), 2.0 + 0.34 * len(training)]
    panels = [panel for panel in (0, 1) if (loaders, training)[panel]]
    if not panels:
        return False
    tall = [heights[panel] for panel in panels]
    figure = Figure(figsize=(10, 0.8 + sum(tall)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=tall)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        if panel == 0:
            _loaders(axis, loaders, sides, sizes)
        else:
            _training(axis, training)
    device, options = rows[0]["device"], rows[0]["options"]
    title = f"Images per second on {device['name']} ({device['type']})"
    about = [f"data: {options['data']} ({options['source']})"]
    if not rows[0]["complete"]:
        about.append("stopped midway")
    notes = ["; ".join(about), *measure.cautions(options, rows[0]["quick"])]
    if training:
        figure.supxlabel(COPYING, fontsize=8)
    figure.suptitle("\n".join([title, *notes]), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
    return True


def _loaders(axis: Axes, rows: Sequence[Line], sides: Sequence[str], sizes: Sequence[int]) -> None:
    apart = 0.8 / len(sizes)
    for number, size in enumerate(sizes):
        mine = [row for row in rows if row["case"]["batch_size"] == size]
        at = [sides.index(row["case"]["side"]) - 0.4 + (number + 0.5) * apart for row in mine]
        _points(axis, mine, at, *SIZES[number % len(SIZES)], f"batch {size}")
        for row, height in zip(mine, at, strict=True):
            axis.annotate(
                f"{row['median']:,.0f}",
                (row["p80"], height),
                xytext=(7, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=8,
            )
    for number in range(1, len(sides)):
        axis.axhline(number - 0.5, color="#DDDDDD", linewidth=0.8)
    axis.set_yticks(range(len(sides)), sides)
    title = "Loaders: median of whole passes, with the 20th to 80th percentile"
    ends = [row[key] for row in rows for key in ("p20", "p80")]
    _finish(axis, title, ends, columns=min(len(sizes), 5))


def _points(
    axis: Axes, rows: Sequence[Line], at: Sequence[float], colour: str, marker: str, label: str
) -> None:
    """The medians with their percentiles as error bars, each at its height."""
    axis.errorbar(
        [row["median"] for row in rows],
        at,
        xerr=[
            [row["median"] - row["p20"] for row in rows],
            [row["p80"] - row["median"] for row in rows],
        ],
        color=colour,
        marker=marker,
        markersize=6,
        linestyle="none",
        capsize=2.5,
        label=label,
    )


def _training(axis: Axes, rows: Sequence[Line]) -> None:
    names = []
    for row in rows:
        case = row["case"]
        names.append(
            f"{case['model']}, batch {case['batch_size']}, {case['form']}, "
            f"{epoch_name(case['ratio'])}"
        )
    values = [row[key] for row in rows for key in ("p20", "p80")]
    for key, (colour, marker), label in (
        ("resident_images/s", ALONE, "network alone"),
        ("dataset_images/s", DATASET, "of the data set, over a pruned epoch's time"),
        ("loader_images/s", LOADER, "loader alone"),
    ):
        at = [i for i, row in enumerate(rows) if row["case"]["ratio"] or key != "dataset_images/s"]
        rates = [rows[i]["more"][key] for i in at]
        values += rates
        size = 110 if marker == "*" else 48
        axis.scatter(rates, at, s=size, color=colour, marker=marker, edgecolor="white", label=label)
    for pruned, style, label in (
        (False, FULL, "fed, full data"),
        (True, PRUNED, "fed, pruned epochs"),
    ):
        at = [i for i, row in enumerate(rows) if bool(row["case"]["ratio"]) == pruned]
        _points(axis, [rows[i] for i in at], at, *style, label)
    beside = axis.get_yaxis_transform()
    head = "fed: images/s, TFLOP/s,\n% of arithmetic, of copying*"
    axis.text(1.01, 1.01, head, transform=axis.transAxes, fontsize=8)
    for number, row in enumerate(rows):
        shares = [row["more"][f"{limit}_limit_percent"] for limit in ("compute", "copy")]
        fed = f"{row['median']:,.0f}, {figures(row['more']['TFLOP/s'])}, " + ", ".join(
            f"{figures(share)}%" for share in shares
        )
        axis.text(1.01, number, fed, transform=beside, verticalalignment="center", fontsize=8)
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    title = "Training, fed by our loader: median, with the 20th to 80th percentile"
    _finish(axis, title, values, columns=3)


def _finish(axis: Axes, title: str, values: Sequence[float], columns: int) -> None:
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 1.4, max(values) * 1.8)  # room for the figures beside the points
    axis.set_xlabel("images/s (logarithmic)")
    axis.grid(axis="x", which="major", alpha=0.3)
    axis.set_axisbelow(True)
    entries = len(axis.get_legend_handles_labels()[1])
    lines = math.ceil(entries / columns)
    axis.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False, fontsize=9
    )
    axis.set_title(title, fontsize=10, pad=12 + 15 * lines)
