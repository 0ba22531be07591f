"""The tables that `throughput.py` makes of its rows, as Markdown for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from training_rows import epoch_name

from infobatch_fast.report.text import figures, markdown

# Also below the plot, hence in lines.
COPYING = (
    "* of the bytes that an eager step at the form's precision reads and writes, forward and "
    "backward, operation by operation:\na step that is fused, or whose tensors stay in a cache, "
    "moves fewer, so that its share may pass 100%"
)

Line = Mapping[str, Any]


def summary(lines: Sequence[Line]) -> list[str]:
    """The tables as Markdown, the note to the last, and what is absent from them."""
    said: list[str] = []
    for table in (loader_table(lines), training_table(lines), work_table(lines)):
        said += ["", *table] if len(table) > 2 else []
    said += ["", *COPYING.splitlines()] if _trained(lines) else []
    return [*said, "", *absent_lines(lines)]


def loader_table(lines: Sequence[Line]) -> list[str]:
    """Markdown: a row a side, a column a batch size."""
    rows = [line for line in lines if line["part"] == "loaders" and line["absent"] is None]
    sizes = sorted({line["case"]["batch_size"] for line in rows})
    sides = dict.fromkeys(line["case"]["side"] for line in rows)
    cells = {
        (line["case"]["side"], line["case"]["batch_size"]): (
            f"{figures(line['median'])} ({figures(line['more']['copy_limit_percent'])}%)"
        )
        for line in rows
    }
    headers = ["images/s (% of the copy limit)", *(f"batch {size}" for size in sizes)]
    table = [[side, *(cells.get((side, size), "absent") for size in sizes)] for side in sides]
    return markdown(headers, table)


def training_table(lines: Sequence[Line]) -> list[str]:
    """Markdown: a row a network, form and epoch."""
    table = []
    for line in _trained(lines):
        more = line["more"]
        table.append(
            [
                *_case(line),
                figures(more["resident_images/s"]),
                figures(line["median"]),
                f"{figures(more['loader_images/s'])} "
                f"({figures(more['loader_copy_limit_percent'])}%)",
                figures(more["dataset_images/s"]),
            ]
        )
    headers = ["images/s", "epoch", "network alone", "fed"]
    headers += ["loader alone (% of the copy limit)", "of the data set"]
    return markdown(headers, table, left=2)


def work_table(lines: Sequence[Line]) -> list[str]:
    """Markdown: a row a network, form and epoch, held against the device's limits."""
    table = []
    for line in _trained(lines):
        more = line["more"]
        shares = [
            f"{figures(more[f'{side}TFLOP/s'])} "
            f"({figures(more[f'{side}compute_limit_percent'])}%, "
            f"{figures(more[f'{side}copy_limit_percent'])}%)"
            for side in ("resident_", "")
        ]
        work = [figures(more["image_FLOP"] / 1e9), figures(more["eager_image_bytes"] / 1e6)]
        table.append([*_case(line), more["compute_limit"], *work, *shares])
    headers = ["TFLOP/s (% of the limit, % of the copy limit*)", "epoch", "limit"]
    headers += ["GFLOP an image", "MB an image*", "network alone", "fed"]
    return markdown(headers, table, left=3)


def _trained(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line["part"] == "training" and line["absent"] is None]


def _case(line: Line) -> list[str]:
    case = line["case"]
    name = f"{case['model']}, batch {case['batch_size']}, {case['form']}"
    return [name, epoch_name(case["ratio"])]


def absent_lines(lines: Sequence[Line]) -> list[str]:
    """What has no figures, and why."""
    return [
        f"absent: {', '.join(str(value) for value in line['case'].values())}: {line['absent']}"
        for line in lines
        if line["absent"] is not None
    ]
