"""The README's table of results, made from committed records alone.

`python bench/results_table.py FOLDER/results.jsonl ...` prints a table for each file that
`bench/reproduce.py` wrote; a test holds the README to it. Runs of one training, which differ in
their seeds alone, are a row; what is not done is in none.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infobatch_fast.errors import UserError, reason
from infobatch_fast.pruning import FULL, Pruning
from infobatch_fast.report.paired import quantile
from infobatch_fast.report.text import markdown
from infobatch_fast.train.records import Summary, parse, read_object

HEADERS = ("training", "samples saved", "accuracy %", "to full data", "to training shorter", "n")
Run = tuple[Pruning, int, Summary]  # the method, and the seed


def read(path: Path) -> list[Run]:
    """The runs of a results.jsonl that are done; UserError where they do not belong together."""
    runs: list[Run] = []
    kinds: set[str] = set()
    try:
        for line in (read_object(line, str(path)) for line in path.read_text().splitlines()):
            if line["state"] == "done":
                config, summary = line["config"], parse(Summary, line["summary"], str(path))
                runs.append((Pruning.of(config).method, config["seed"], summary))
                alike = [line[name] for name in ("data", "source_hash", "device")]
                alike += [config[name] for name in ("dataset", "model", "data_fraction")]
                kinds.add(json.dumps(alike, sort_keys=True))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} must hold results of reproduce.py: {reason(error)}") from None
    if len(kinds) != 1:
        raise UserError(f"{path} must hold runs of one setting and source, got {len(kinds)}")
    return runs


def table(runs: Sequence[Run]) -> list[str]:
    """A row a training: means over its seeds, and differences paired by seed.

    A difference is in points of accuracy; in parentheses its two-sided 95% t interval holds 0.
    Training shorter is full data for fewer epochs, of the most nearly equal number of samples.
    """
    rows: dict[tuple[Pruning, int], dict[int, Summary]] = {}
    for method, seed, run in runs:
        rows.setdefault((method, run.epochs), {})[seed] = run
    longest = max(epochs for _, epochs in rows)
    full = {s: run for method, s, run in runs if method == FULL and run.epochs == longest}
    less = [(s, run) for method, s, run in runs if method == FULL and run.epochs < longest]
    cells = []
    for (method, epochs), row in rows.items():
        nearest: dict[int, Summary] = {}
        for seed, run in row.items() if method != FULL else ():
            by_distance = {
                abs(r.samples_trained - run.samples_trained): r for s, r in less if s == seed
            }
            if by_distance:
                nearest[seed] = by_distance[min(by_distance)]
        saved = [1 - (1 - run.saved_share) * epochs / longest for run in row.values()]
        cells.append(
            [
                f"{method.label}, {epochs} epochs",
                f"{statistics.fmean(saved):.1%}",
                _mean([100 * run.accuracy_last for run in row.values()], ".2f"),
                "-" if row == full else _difference(row, full),
                _difference(row, nearest),
                str(len(row)),
            ]
        )
    return list(markdown(HEADERS, cells))


def _difference(mine: dict[int, Summary], theirs: dict[int, Summary]) -> str:
    both = mine.keys() & theirs.keys()
    points = [100 * (mine[seed].accuracy_last - theirs[seed].accuracy_last) for seed in both]
    if not points:
        return "-"
    if len(points) > 1:
        error = statistics.stdev(points) / len(points) ** 0.5
        if abs(statistics.fmean(points)) > quantile(len(points) - 1) * error:
            return _mean(points, "+.2f")
    return f"({_mean(points, '+.2f')})"


def _mean(values: Sequence[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


if __name__ == "__main__":
    try:
        for word in sys.argv[1:]:
            print("\n".join(table(read(Path(word)))))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
