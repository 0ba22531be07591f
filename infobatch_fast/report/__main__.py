"""Tables and plots from the records of runs and benchmarks: `python -m infobatch_fast.report`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from infobatch_fast.errors import UserError
from infobatch_fast.report import text as tables
from infobatch_fast.report.benchmarks import benchmark_tables
from infobatch_fast.report.groups import Section, counted, main_source, sections
from infobatch_fast.report.page import MARK, Block, Heading, Table, Text, markdown, page, printable
from infobatch_fast.report.paired import AGAINST, comparison
from infobatch_fast.report.plots import plots
from infobatch_fast.report.read import read
from infobatch_fast.report.records import Inputs, Run
from infobatch_fast.report.samples import samples
from infobatch_fast.report.tables import experiment, notes, run_tables
from infobatch_fast.train import cli as command
from infobatch_fast.train import folder as record
from infobatch_fast.train.records import write_atomically

TITLE = "InfoBatch: experiments and benchmarks"
NAMES = ("report.md", "report.html")
PAPER = "https://arxiv.org/abs/2303.04947"
NONE_REPORTED = "No run of the reported setting was given: none of its figures is measured."
_MOST_PLOTTED = 8  # settings
_EMPTY = Section({"epochs": 200, "data_fraction": 1.0}, "", True, False, True, (), ())


@dataclass(frozen=True)
class Options:
    """Tables and plots of runs and benchmarks, beside the reported figures.

    Writes report.md and report.html, one page that needs nothing else. An input that cannot be
    read is named, and the rest reported. Exit codes: 0 done; 2 a mistake in the input, or nothing
    to report; 130 or 143 stopped by a signal.

    Attributes:
        runs: folders of runs, benchmarks' .jsonl files, folders that hold those, or folders of
            such folders.
        out: folder of the report; what is in it stays, but for an older report.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint=""),
    ] = ()
    out: Path = Path("report")


def compose(inputs: Inputs) -> list[Block]:
    """The whole report."""
    blocks: list[Block] = [Heading(TITLE, 1)]
    if inputs.runs:
        source, _ = main_source(inputs.runs)
        found = sections(inputs.runs, source)
        blocks += _introduction(inputs.runs)
        blocks += _experiments(found)
        blocks += [Heading("Run by run", 2), *run_tables(inputs.runs, source)]
        blocks += _plots(found)
        blocks += samples(found)
    if inputs.benchmarks:
        blocks += [Heading("Benchmarks", 2), *benchmark_tables(inputs.benchmarks)]
    if inputs.bad:
        blocks += [
            Heading("Not reported", 2),
            Table(
                "Inputs that could not be read, in all or in part",
                ["path", "reason"],
                inputs.bad,
                left=2,
            ),
        ]
    return blocks


def _introduction(runs: Sequence[Run]) -> list[Block]:
    texts = [
        "A mean is over complete runs of one setting, one training, one device and one source, "
        "which differ in their seeds alone; ± is the sample standard deviation (n - 1). Letters "
        'name the runs, which "Run by run" tells of. Accuracy is of the last epoch, time is of '
        "training with its pruning, overhead is the pruning in it, and the total has evaluation "
        "and checkpoints as well, on one device."
    ]
    source, tie = main_source(runs)
    if any(run.about["source_hash"] != source for run in runs if run.copy_of is None):
        which = (
            "as many runs are of another source as of the source of the first such run"
            if tie
            else "most runs are of the source"
        )
        texts.append(f"OTHER SOURCE marks runs of another source tree: {which}, {source[:8]}.")
    return [Text(text) for text in texts]


def _experiments(found: Sequence[Section]) -> list[Block]:
    blocks: list[Block] = [Heading("The reported experiments", 2)]
    blocks.append(
        Text(
            "Reported: CIFAR-10, ResNet-50, 200 epochs, batch 200, LARS, max lr 5.2, on one A100, "
            "from the InfoBatch paper (ICLR 2024); the ablation is of single runs.",
            PAPER,
        )
    )
    if not any(section.reported for section in found):
        blocks += [Text(NONE_REPORTED), *experiment(_EMPTY)]
    for section in found:
        if not section.reported:
            continue
        blocks += [Heading(section.title, 3), *experiment(section), *comparison(section)]
    others = [section for section in found if not section.reported]
    if others:
        blocks += [
            Heading("Other settings", 2),
            Text("These are not the reported setting, and not comparable with its figures."),
        ]
    for section in others:
        blocks += [Heading(section.title, 3), *experiment(section), *comparison(section)]
    return blocks


def _plots(found: Sequence[Section]) -> list[Block]:
    blocks: list[Block] = [Heading("Plots", 2)]
    for section in found[:_MOST_PLOTTED]:
        blocks += [Heading(section.title, 3), *plots(section)]
    if len(found) > _MOST_PLOTTED:
        left = len(found) - _MOST_PLOTTED
        blocks.append(Text(f"Left out: the plots of {counted(left, 'further setting')}."))
    return blocks


def run(arguments: Sequence[str], say: command.Say) -> None:
    """The command line: read, compose, write.

    Raises:
        UserError: there is nothing to report, or it cannot be written.
    """
    options = command.parse(Options, arguments, "python -m infobatch_fast.report", Options())
    if not options.runs:
        raise UserError("runs must name at least one folder or .jsonl file, got none")
    _check_ours(options.out)
    inputs = read(options.runs)
    for path, why in inputs.bad:
        command.complain(f"warning: {path}: {why}", 0)
    if not inputs.runs and not inputs.benchmarks:
        raise UserError("runs must hold something to report, got nothing that can be read")
    blocks = compose(inputs)
    record.make_folder(options.out)
    for name, text in zip(NAMES, (markdown(blocks), page(TITLE, blocks)), strict=True):
        write_atomically(options.out / name, text.encode())
    for line in _essence(inputs):
        say(printable(line))
    say(printable(f"report     {options.out}: {' and '.join(NAMES)}"))


def _check_ours(folder: Path) -> None:
    """Raise UserError if a file of somebody else's would be overwritten."""
    for path in (folder / name for name in NAMES):
        try:
            ours = not path.exists() or (
                path.is_file() and MARK.encode() in path.read_bytes()[:200]
            )
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if not ours:
            raise UserError(
                f"out must hold no {path.name} that this command did not write, got {path}"
            )


def _essence(inputs: Inputs) -> Iterator[str]:
    """What the terminal gets: accuracy and time by setting, the runs, and the benchmarks."""
    blocks: list[Block] = []
    if inputs.runs:
        source, _ = main_source(inputs.runs)
        found = sections(inputs.runs, source)
        if not any(section.reported for section in found):
            yield NONE_REPORTED
        for section in found:
            if section.rows:
                about = "" if section.reported else " (not the reported setting)"
                blocks += [Heading(section.title + about, 3), experiment(section)[0]]
                blocks += notes(section)
                against = comparison(section)
                blocks += [Heading(AGAINST, 3), *against] if against else []
        blocks += [Heading("Figures of each run", 3), run_tables(inputs.runs, source)[1]]
    blocks += [b for b in benchmark_tables(inputs.benchmarks) if not isinstance(b, Text)]
    for block in blocks:
        if isinstance(block, Heading):
            yield ""
            yield block.text
        elif isinstance(block, Text):
            yield block.text
        elif isinstance(block, Table):
            yield from tables.markdown(block.headers, block.rows, block.left)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return command.command(lambda _, say: run(words, say), "report fewer runs at a time")


if __name__ == "__main__":
    sys.exit(main())
