"""The tables and the plot of the overhead benchmark, from its lines."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness as measure
from matplotlib.figure import Figure
from overhead_parts import PAIRED, find
from overhead_sides import SIDES

from infobatch_fast.report.text import figures, markdown, seconds
from infobatch_fast.train.records import write_atomically

# One A100, CIFAR-10, ResNet-50, r = 0.5, 200 epochs (arXiv:2303.04947): s of overhead an epoch, and
# the epoch without pruning and with.
REPORTED_OVERHEAD = 1.03
REPORTED_FULL, REPORTED_PRUNED = 231.10 * 60 / 200, 148.44 * 60 / 200
CLAIM = 1.0  # % of a step that telemetry may take

COLOURS = {  # Okabe and Ito's, with a marker and a line each
    "device": ("#0072B2", "o", "-"),
    "numpy": ("#E69F00", "s", "--"),
    "none": ("#009E73", "^", ":"),
    "original": ("#D55E00", "D", "-."),
}


def tables(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines as Markdown tables; times are medians."""
    out: list[str] = []
    for part, title in (
        ("choose", "Choose an epoch: threshold, choice and shuffle of N samples"),
        ("update", "Update with a batch: rescaled mean, backward, record"),
    ):
        keys = dict.fromkeys(
            (line["case"]["samples"], line["case"]["clock"])
            for line in lines
            if line["part"] == part
        )
        rows = []
        for samples, clock in keys:
            found = [find(lines, part, samples=samples, clock=clock, side=s) for s in SIDES]
            cells = [seconds(row["median"]) if row else "-" for row in found]
            rows.append([f"{samples:,}", clock, *cells])
        out += ["", f"## {title}", "", *markdown(["N", "clock", *SIDES], rows, left=2)]
    out += [*_step_table(lines), *_epoch_table(lines), *_host_table(lines)]
    out += _telemetry_table(lines)
    return [*out, *_absent(lines)]


def _absent(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    sizes: dict[tuple[str, str], dict[int, None]] = {}
    for line in lines:
        if line["absent"] is not None and line["part"] != "epoch":
            case = line["case"]
            why = case.get("side", line["part"]), line["absent"]
            sizes.setdefault(why, {})[case["samples"]] = None
    whys = [
        f"- {name} at N = {' and '.join(f'{size:,}' for size in of)}: {why}"
        for (name, why), of in sizes.items()
    ]
    return ["", "## Absent", "", *whys] if whys else []


def _step_table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [(side, find(lines, "step", side=side)) for side in ("with", "without", "difference")]
    measured = [
        [f"{side} InfoBatch", seconds(row["median"]), _ends(row, "p20", "p80"), str(row["count"])]
        for side, row in rows[:2]
        if row
    ]
    gap = rows[2][1]
    if gap is None:
        return []
    more = gap["more"]
    interval = f"{seconds(more['low_seconds'])} to {seconds(more['high_seconds'])} (95%)"
    measured.append([PAIRED, seconds(gap["median"]), interval, str(gap["count"])])
    for clock in ("wall", "device"):
        if f"update_{clock}_seconds" in more:
            added = more[f"update_{clock}_seconds"]
            inside = more[f"update_{clock}_inside"]
            where = _place(added, inside, more["low_seconds"], more["high_seconds"])
            name = f"update less plain mean, alone ({clock})"
            measured.append([name, seconds(added), where, ""])
    case = gap["case"]
    title = f"A whole step: {case['model']}, amp {case['amp']}, batch {case['batch_size']}"
    return ["", f"## {title}", "", *markdown(["step", "median", "range", "count"], measured)]


def _place(value: float, inside: bool, low: float, high: float) -> str:
    if not inside:
        return "NOT inside the interval"
    wide = f", which is {figures((high - low) / abs(value))} times as wide as it" if value else ""
    # An interval that holds nothing as well is no evidence that the value is right.
    return f"inside the interval{wide}" + (": too wide to tell" if low <= 0 <= high else "")


def _ends(row: Mapping[str, Any], low: str, high: str) -> str:
    return f"{seconds(row[low])} to {seconds(row[high])}"


def _epoch_table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {side: find(lines, "epoch", side=side) for side in SIDES}
    some = next((row for row in found.values() if row), None)
    if some is None:
        return []
    plain = found["none"]
    rows = []
    for side, row in found.items():
        if row is None:
            rows.append([side, *"------"])
            continue
        more = row["more"]
        times = [more["choose_seconds"], more["updates_seconds"], row["median"]]
        beyond = seconds(row["median"] - plain["median"]) if plain else "-"
        parts = [more["pruned_epoch_percent"], more["full_epoch_percent"]]
        rows.append([side, *map(seconds, times), beyond, *(f"{figures(p)}%" for p in parts)])
    of = [100 * REPORTED_OVERHEAD / epoch for epoch in (REPORTED_PRUNED, REPORTED_FULL)]
    reported = [seconds(REPORTED_OVERHEAD), *(f"{figures(part)}%" for part in of)]
    rows.append(["reported, one A100", "-", "-", reported[0], "-", *reported[1:]])
    headers = [
        "side",
        "choose",
        "updates",
        "both",
        "beyond none",
        "of pruned epoch",
        "of full epoch",
    ]
    pruned, full = (some["more"][f"{kind}_epoch_steps"] for kind in ("pruned", "full"))
    note = f"A pruned epoch has {pruned} steps, a full one {full}; shares are of steps without it."
    title = f"## Overhead of a pruned epoch at N = {some['case']['samples']:,}"
    return ["", title, "", note, "", *markdown(headers, rows)]


def _host_table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for line in lines:
        if line["part"] == "host" and line["absent"] is None:
            syncs = line["more"]["host_syncs"]
            shown = "not seen on a CPU" if syncs is None else str(syncs)
            case = line["case"]
            rows.append([case["what"], case["side"], seconds(line["median"]), shown])
    table = markdown(["call", "side", "until it returns", "host syncs"], rows, left=2)
    return ["", "## The host", "", *table] if rows else []


def _telemetry_table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    on, off, gap = (find(lines, "telemetry", side=s) for s in ("on", "off", "difference"))
    if on is None or off is None or gap is None:
        return []
    median, low, high = (gap["more"][f"{name}_percent"] for name in ("median", "low", "high"))
    claim = "yes" if high < CLAIM else "no" if low >= CLAIM else "not decided by this interval"
    rows = [
        ["on", seconds(on["median"]), _ends(on, "p20", "p80")],
        ["off", seconds(off["median"]), _ends(off, "p20", "p80")],
        [PAIRED, f"{figures(median)}%", f"{figures(low)}% to {figures(high)}% (95%)"],
        [f"below {CLAIM:g}% of a step", claim, ""],
    ]
    title = f"Telemetry: a step in groups of {on['more']['group_steps']}, {gap['count']} each"
    return ["", f"## {title}", "", *markdown(["telemetry", "median", "range"], rows)]


def draw(lines: Sequence[Mapping[str, Any]], device: str, path: Path) -> bool:
    """Draw the cost of choosing against N, and the overhead as a share of an epoch, as a PNG.

    Args:
        lines: of the benchmark, all or those before it was stopped.
        device: in words.
        path: of the PNG.

    Returns:
        Whether there was a row to draw.

    Raises:
        UserError: it cannot be written.
    """
    if not find(lines, "choose", clock="wall"):  # the first that is measured
        return False
    figure = Figure(figsize=(12, 5.4), dpi=110, layout="constrained")
    notes = measure.cautions(lines[0]["options"], lines[0]["quick"])
    if not lines[0]["complete"]:
        notes.append("stopped midway")
    title = f"Pruning overhead on {device}"
    figure.suptitle(
        "\n".join(part for text in (title, *notes) for part in textwrap.wrap(text, 100))
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))

    for side, (colour, marker, style) in COLOURS.items():
        rows = [
            line
            for line in lines
            if line["part"] == "choose" and line["absent"] is None
            if line["case"]["side"] == side and line["case"]["clock"] == "wall"
        ]
        if rows:
            x = [row["case"]["samples"] for row in rows]
            y, low, high = ([row[key] for row in rows] for key in ("median", "p20", "p80"))
            left.plot(x, y, color=colour, marker=marker, linestyle=style, label=side)
            left.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    left.set(xscale="log", yscale="log", xlabel="samples N", ylabel="seconds an epoch (wall)")
    left.set_title("Choose and shuffle: median, p20 to p80 shaded")
    left.grid(which="major", alpha=0.3)
    left.legend()

    bars = [
        (f"{side}\n(this device)", row["median"], row["more"]["full_epoch_percent"], colours[0])
        for side, colours in COLOURS.items()
        if (row := find(lines, "epoch", side=side))
    ]
    share = 100 * REPORTED_OVERHEAD / REPORTED_FULL
    bars.append(("reported\n(one A100)", REPORTED_OVERHEAD, share, "#BBBBBB"))
    names, overheads, percents, colours = zip(*bars, strict=True)
    drawn = right.barh(names, percents, color=colours)
    drawn[-1].set_hatch("//")
    notes = [
        f"{figures(percent)}%\n{seconds(overhead)} of {seconds(100 * overhead / percent)}"
        for overhead, percent in zip(overheads, percents, strict=True)
    ]
    right.bar_label(drawn, notes, padding=4)
    right.set_xlim(0, 1.6 * max(percents))
    right.invert_yaxis()
    right.set(xlabel="choose and updates, % of a full epoch's steps on the same device")
    some = find(lines, "epoch")
    size = f"at N = {some['case']['samples']:,}" if some else "(here: not measured)"
    right.set_title(f"Overhead of a pruned epoch {size}")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    return True
