"""Tables and plots from the records of runs and benchmarks: `python -m infobatch_fast.report`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from infobatch_fast.errors import UserError
from infobatch_fast.report.benchmarks import benchmark_tables
from infobatch_fast.report.page import MARK, Block, Heading, Table, Text, markdown, page, terminal
from infobatch_fast.report.plots import plots
from infobatch_fast.report.read import Inputs, read
from infobatch_fast.report.runs import sections
from infobatch_fast.report.tables import answer, budget_table, reported_tables, run_table
from infobatch_fast.train.cli import command, complain, parse, say
from infobatch_fast.train.records import make_folder, write_atomically

NAMES = ("report.md", "report.html")


@dataclass(frozen=True)
class Options:
    """What pruning cost and saved, from the records of runs and benchmarks.

    Prints the answer, and writes report.md and report.html, one page that needs nothing else. An
    input that cannot be read is named, and the rest reported. Exit codes: 0 done; 2 a mistake in
    the input, or nothing to report; 130 or 143 stopped by a signal.

    Attributes:
        runs: folders of runs, benchmarks' .jsonl files, or folders that hold those.
        out: folder of the report; what is in it stays, but for an older report.
        brief: print the sentence alone that answers, and which settings it leaves out.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint=""),
    ] = ()
    out: Path = Path("report")
    brief: bool = False


def compose(inputs: Inputs) -> tuple[list[Block], list[Block]]:
    """The first screen, and what stands below it."""
    first: list[Block] = []
    rest: list[Block] = []
    found = sections(inputs.runs)
    for section in found:
        (rest if first else first).extend([Heading(section.title, 1), *answer(section)])
        rest += [*budget_table(section), *reported_tables(section)]
        rest += [Heading("Runs", 2), *run_table(section)]
        rest += [Heading("Plots", 2), *plots(section)]
    if others := [section.title for section in found[1:]]:
        first.append(Text(f"Further settings, below: {'; '.join(others)}.", "others"))
    if tables := benchmark_tables(inputs.benchmarks):
        (rest if first else first).extend([Heading("Benchmarks", 1), *tables])
    if inputs.bad:
        rows = [[path, why] for path, why in inputs.bad.items()]
        rest += [Heading("Not reported", 2), Table(["path", "reason"], rows, left=2)]
    return first, rest


def run(arguments: Sequence[str]) -> None:
    """The command line: read, compose, write."""
    options = parse(Options, arguments, "python -m infobatch_fast.report", Options())
    if not options.runs:
        raise UserError("runs must name at least one folder or .jsonl file, got none")
    inputs = read(options.runs)
    if not inputs.runs and not inputs.benchmarks:
        path, why = next(iter(inputs.bad.items()))
        raise UserError(f"runs must hold something to report, got {path}: {why}")
    for path, why in inputs.bad.items():
        complain(f"warning: {path}: {why}", 0)
    first, rest = compose(inputs)
    blocks = [*first, *rest]
    title = next(block.text for block in blocks if isinstance(block, Heading))
    make_folder(options.out)
    for name, text in zip(NAMES, (markdown(blocks), page(title, blocks)), strict=True):
        path = options.out / name
        if path.exists() and MARK.encode() not in path.read_bytes()[:200]:
            raise UserError(f"out must hold no {name} that this command did not write, got {path}")
        write_atomically(path, text.encode(errors="backslashreplace"))
    if options.brief:
        told = ("answer", "others")
        first = [block for block in first if isinstance(block, Text) and block.role in told]
    for line in terminal(first):
        say(line)
    say(f"report     {options.out}: {' and '.join(NAMES)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return command(lambda _: run(words), "report fewer runs at a time")


if __name__ == "__main__":
    sys.exit(main())
