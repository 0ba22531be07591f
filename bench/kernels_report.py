"""The tables and the plot of the kernels' benchmark, from its lines."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness as measure
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infobatch_fast.report.text import figures, markdown, seconds
from infobatch_fast.train.records import write_atomically

Line = Mapping[str, Any]

STYLES = {  # Okabe and Ito's, with a marker and a line each, and a hatch for bars
    "ours": ("#0072B2", "o", "-", ""),
    "torch": ("#E69F00", "s", "--", "///"),
    "compiled": ("#009E73", "^", ":", "..."),
    "loop": ("#D55E00", "D", "-.", "xxx"),
}
EPOCH_KERNELS = ("threshold", "partition", "choose", "shuffle", "choosing")
SIZE_NAMES = {"samples": "N", "batch_size": "B", "classes": "C"}


def tables(lines: Sequence[Line]) -> list[str]:
    """The lines as Markdown tables."""
    present = [line for line in lines if line["absent"] is None]
    out = _kernel_table([line for line in present if line["part"] == "kernels"])
    out += _launch_table([line for line in present if line["part"] == "launches"])
    out += _step_table([line for line in present if line["part"] == "step"])
    out += _choosing_table([line for line in present if line["part"] == "choosing"])
    why: dict[str, list[str]] = {}
    for line in lines:
        if line["absent"] is not None:
            why.setdefault(line["absent"], []).append(case_name(line["case"], sided=True))
    whys = [f"- {'; '.join(dict.fromkeys(names))}: {reason}" for reason, names in why.items()]
    return [*out, "", "## Absent", "", *whys] if whys else out


def case_name(case: Mapping[str, Any], sided: bool = False) -> str:
    """A case in words, such as "cross_entropy, B = 200, C = 10"."""
    words = [
        f"{SIZE_NAMES[key]} = {value:,}" if key in SIZE_NAMES else str(value)
        for key, value in case.items()
        if sided or key != "side"
    ]
    return ", ".join(words)


def _kernel_table(rows: Sequence[Line]) -> list[str]:
    cells = []
    for row in rows:
        more = row["more"]
        moved = [figures(more[key]) if key in more else "-" for key in ("moved_GB/s",)]
        share = f"{figures(more['copy_limit_percent'])}%" if "copy_limit_percent" in more else "-"
        megabytes = figures(more["moved_bytes"] / 1e6) if "moved_bytes" in more else "-"
        ends = f"{seconds(row['p20'])} to {seconds(row['p80'])}"
        name, side = case_name(row["case"]), row["case"]["side"]
        cells.append(
            [name, side, more["clock"], seconds(row["median"]), ends, megabytes, *moved, share]
        )
    headers = ["kernel", "side", "clock", "median", "p20 to p80", "MB", "GB/s", "of a copy"]
    title = "Kernels: time of a repetition; GB/s of the bytes that ours move"
    return ["", f"## {title}", "", *markdown(headers, cells, left=3)] if cells else []


def _launch_table(rows: Sequence[Line]) -> list[str]:
    found = {(row["case"]["what"], row["case"]["side"]): row for row in rows}
    cells = []
    for what in dict.fromkeys(what for what, _ in found):
        ours = found.get((what, "ours"))
        split = "-"
        if ours is not None:
            more = ours["more"]
            split = f"{ours['median']} ({more['triton_launches']} + {more['torch_operations']})"
        others = [found.get((what, side)) for side in ("torch", "loop")]
        cells.append([what, split, *(str(row["median"]) if row else "-" for row in others)])
    title = "Launches of a call, at least: ours is (Triton's + torch's operations)"
    headers = ["call", "ours", "torch", "loop"]
    return ["", f"## {title}", "", *markdown(headers, cells)] if cells else []


def _step_table(rows: Sequence[Line]) -> list[str]:
    found = {tuple(row["case"].values()): row for row in rows}
    cells = []
    for model, part in dict.fromkeys((model, part) for model, part, _ in found):
        of = [found.get((model, part, side)) for side in ("ours", "torch")]
        host = [row["more"]["host_only_operations"] if row else "-" for row in of]
        cells.append([model, part, *(str(row["median"]) if row else "-" for row in of)])
        cells[-1] += [str(count) for count in host]
    title = "A training step (bf16, LARS): launches at least, and what only the host does"
    headers = ["model", "part", "ours", "torch", "ours, host only", "torch, host only"]
    return ["", f"## {title}", "", *markdown(headers, cells, left=2)] if cells else []


def _choosing_table(rows: Sequence[Line]) -> list[str]:
    found = {(row["case"]["samples"], row["case"]["side"]): row for row in rows}
    cells = []
    for samples in dict.fromkeys(samples for samples, _ in found):
        of = [found.get((samples, side)) for side in ("ours", "numpy", "ours / numpy")]
        times = [seconds(row["median"]) if row else "-" for row in of[:2]]
        ratio, ends, count = "-", "-", "-"
        if of[2] is not None:
            ratio, count = figures(of[2]["median"]), str(of[2]["count"])
            ends = f"{figures(of[2]['p20'])} to {figures(of[2]['p80'])}"
        cells.append([f"{samples:,}", *times, ratio, ends, count])
    title = "Choosing an epoch on the CPU, beside numpy's way"
    headers = ["N", "ours", "numpy", "ours / numpy", "p20 to p80", "rounds"]
    return ["", f"## {title}", "", *markdown(headers, cells)] if cells else []


def draw(lines: Sequence[Line], device: str, path: Path) -> bool:
    """Draw the rows that have figures, as a PNG.

    GB/s against N with the rate of a copy on a GPU, counts and ratios on a CPU.

    Args:
        lines: of a benchmark's file.
        device: its name, for the title.
        path: of the PNG.

    Returns:
        Whether there was a row to draw.

    Raises:
        UserError: it cannot be written.
    """
    rows = [line for line in lines if line["absent"] is None]
    kernels = [line for line in rows if line["part"] == "kernels"]
    if kernels:
        figure = Figure(figsize=(14, 9), dpi=100, layout="constrained")
        copy = next(line["median"] for line in rows if line["part"] == "limits") / 1e9
        axes = figure.subplots(2, 3).flatten()
        for axis, kernel in zip(axes, EPOCH_KERNELS, strict=False):
            _rates(axis, [row for row in kernels if row["case"]["kernel"] == kernel], kernel, copy)
        fixed = [row for row in kernels if row["case"]["kernel"] not in (*EPOCH_KERNELS, "sample")]
        _times(axes[-1], fixed)
        _legend(figure, axes)
        title = f"Kernels on {device}"
    else:
        parts = [
            (_counts, [line for line in rows if line["part"] == "launches"]),
            (_ratios, [line for line in rows if line["case"].get("side") == "ours / numpy"]),
        ]
        parts = [(panel, of) for panel, of in parts if of]
        if not parts:
            return False
        figure = Figure(figsize=(6.5 * len(parts), 5.6), dpi=100, layout="constrained")
        axes = figure.subplots(1, len(parts), squeeze=False)[0]
        for axis, (panel, of) in zip(axes, parts, strict=True):
            panel(axis, of)
        title = f"What the kernels save, as far as a CPU can tell: {device}"
    notes = measure.cautions(rows[0]["options"], rows[0]["quick"])
    if not rows[0]["complete"]:
        notes.append("stopped midway")
    texts = (title, "; ".join(notes))
    figure.suptitle("\n".join(line for text in texts for line in textwrap.wrap(text, 100)))
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    return True


def _rates(axis: Axes, rows: Sequence[Line], kernel: str, copy: float) -> None:
    """GB/s against N of a kernel's sides, with the copy's as a line."""
    for side, (colour, marker, style, _) in STYLES.items():
        mine = [row for row in rows if row["case"]["side"] == side]
        if mine:
            x = [row["case"]["samples"] for row in mine]
            moved = [row["more"]["moved_bytes"] / 1e9 for row in mine]
            low, middle, high = (
                [m / row[key] for m, row in zip(moved, mine, strict=True)]
                for key in ("p80", "median", "p20")
            )
            axis.plot(x, middle, color=colour, marker=marker, linestyle=style, label=side)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.axhline(copy, color="black", linewidth=1.2, label="a copy's rate")
    axis.set(xscale="log", yscale="log", xlabel="samples N", ylabel="GB/s")
    axis.set_title(kernel)
    axis.grid(which="major", alpha=0.3)


def _times(axis: Axes, rows: Sequence[Line]) -> None:
    """Bars of the time of the kernels that do not depend on N."""
    cases = list(dict.fromkeys(case_name(row["case"]) for row in rows))
    for number, (side, (colour, _, _, hatch)) in enumerate(STYLES.items()):
        mine = [row for row in rows if row["case"]["side"] == side]
        at = [cases.index(case_name(row["case"])) + 0.2 * (number - 1.5) for row in mine]
        times = [1e6 * row["median"] for row in mine]
        if mine:
            axis.barh(at, times, 0.19, color=colour, hatch=hatch, edgecolor="white", label=side)
    # Short, since they take their room from the panels beside.
    short = [case.replace(", B = ", " ").replace(", C = ", " x ") for case in cases]
    axis.set_yticks(range(len(cases)), short, fontsize=7)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="microseconds (logarithmic)")
    axis.set_title("a step's kernels")
    axis.grid(axis="x", which="major", alpha=0.3)
    axis.set_axisbelow(True)


def _counts(axis: Axes, rows: Sequence[Line]) -> None:
    """Bars of launches by call and side."""
    calls = list(dict.fromkeys(row["case"]["what"] for row in rows))
    sides = [side for side in STYLES if any(row["case"]["side"] == side for row in rows)]
    thick = 0.84 / len(sides)
    for number, side in enumerate(sides):
        colour, _, _, hatch = STYLES[side]
        mine = [row for row in rows if row["case"]["side"] == side]
        at = [calls.index(row["case"]["what"]) - 0.42 + (number + 0.5) * thick for row in mine]
        counts = [row["median"] for row in mine]
        bars = axis.barh(
            at, counts, 0.95 * thick, color=colour, hatch=hatch, edgecolor="white", label=side
        )
        axis.bar_label(bars, padding=3, fontsize=8)
    axis.set_yticks(range(len(calls)), calls)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="launches of a call, at least (logarithmic)")
    axis.set_xlim(0.7, 4 * max(row["median"] for row in rows))
    axis.set_title("Launches, counted")
    axis.legend(loc="upper right")


def _ratios(axis: Axes, rows: Sequence[Line]) -> None:
    """InfoBatch's time over numpy's against N."""
    x = [row["case"]["samples"] for row in rows]
    low, middle, high = ([row[key] for row in rows] for key in ("p20", "median", "p80"))
    ends = [
        [m - a for m, a in zip(middle, low, strict=True)],
        [b - m for m, b in zip(middle, high, strict=True)],
    ]
    colour, marker, style, _ = STYLES["ours"]
    axis.errorbar(
        x, middle, ends, color=colour, marker=marker, linestyle=style, capsize=4, label="ours"
    )
    axis.axhline(1, color="black", linewidth=1.2, label="numpy")
    axis.set(xscale="log", xlabel="samples N", ylabel="time over numpy's (1 is equal)")
    axis.set_xlim(min(x) / 2, max(x) * 2)
    axis.set_ylim(0, 1.25 * max(*high, 1.0))
    axis.set_title("Choosing an epoch on the CPU: median, p20 to p80")
    axis.grid(which="major", alpha=0.3)
    axis.legend()


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, below them."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=len(entries)
    )
