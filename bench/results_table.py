"""The README's table of results, made from committed records alone.

`python bench/results_table.py bench/results/NAME.jsonl ...` prints a table for each file, which
`bench/reproduce.py` wrote as results.jsonl; a test holds the README to it. Runs of one training,
which differ in their seeds alone, are a row; what is not done is in none.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from infobatch_fast.errors import UserError, reason
from infobatch_fast.report.groups import counted, mean
from infobatch_fast.report.methods import FULL, Method, of_settings
from infobatch_fast.report.paired import quantile
from infobatch_fast.report.text import markdown
from infobatch_fast.train.cli import Say, command, parse

HEADERS = ("training", "samples saved", "accuracy %", "to full data", "to training shorter", "n")
NONE = "-"
# What runs of one table have in common.
ALIKE = ("dataset", "data", "model", "data_fraction", "source_hash", "device")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the runs that are done.

    Raises:
        UserError: the file cannot be read, or its runs do not belong together.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        done = [line for line in lines if line["state"] == "done"]
        kinds = {json.dumps([line[name] for name in ALIKE], sort_keys=True) for line in done}
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} must hold results of reproduce.py, got {error!r}") from None
    if len(kinds) != 1:
        raise UserError(f"{path} must hold runs of one setting and source, got {len(kinds)}")
    return done


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each training: means over its seeds, and differences paired by seed.

    A difference is in points of accuracy; in parentheses it is one that a two-sided 95% t interval
    cannot tell from 0. Training shorter is full data for fewer epochs.

    Args:
        lines: from `read`.
    """
    rows: dict[tuple[Method, int], dict[int, dict[str, Any]]] = {}
    for line in lines:
        rows.setdefault((of_settings(line["method"]), line["epochs"]), {})[line["seed"]] = line
    longest = max(epochs for _, epochs in rows)
    full = rows.get((FULL, longest), {})
    shorter: dict[int, list[dict[str, Any]]] = {}
    for (method, epochs), runs in rows.items():
        for seed, line in runs.items() if method == FULL and epochs < longest else ():
            shorter.setdefault(seed, []).append(line)
    cells = []
    for (method, epochs), runs in rows.items():
        whole = method == FULL and epochs == longest
        nearest = {
            seed: min(shorter[seed], key=lambda other: abs(other["samples_trained"] - seen))
            for seed, seen in ((seed, line["samples_trained"]) for seed, line in runs.items())
            if seed in shorter and method != FULL
        }
        cells.append(
            [
                f"{method.label}, {counted(epochs, 'epoch')}",
                f"{statistics.fmean(100 * _saved(line, longest) for line in runs.values()):.1f}%",
                mean([100 * line["accuracy_last"] for line in runs.values()], 2),
                NONE if whole else _difference(runs, full),
                _difference(runs, nearest),
                str(len(runs)),
            ]
        )
    return list(markdown(list(HEADERS), cells, 1))


def _saved(line: dict[str, Any], longest: int) -> float:
    """The share of the samples of the longest training's epochs that a run did without."""
    return 1 - (1 - line["saved_share"]) * line["epochs"] / longest


def _difference(mine: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str:
    points = [
        100 * (line["accuracy_last"] - theirs[seed]["accuracy_last"])
        for seed, line in mine.items()
        if seed in theirs
    ]
    if not points:
        return NONE
    text = f"{statistics.fmean(points):+.2f}"
    if len(points) > 1:
        spread = statistics.stdev(points)
        text += f" ± {spread:.2f}"
        if abs(statistics.fmean(points)) > quantile(len(points) - 1) * spread / len(points) ** 0.5:
            return text
    return f"({text})"


@dataclass(frozen=True)
class Options:
    """Print the README's table of results, one for each file.

    Attributes:
        files: results.jsonl of bench/reproduce.py.
    """

    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint=""),
    ] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments

    def run(_: object, say: Say) -> None:
        options = parse(Options, words, "python bench/results_table.py", Options())
        if not options.files:
            raise UserError("files must name at least one results.jsonl, got none")
        for path in options.files:
            for line in table(read(path)):
                say(line)

    return command(run, "name fewer files")


if __name__ == "__main__":
    sys.exit(main())
