"""A method against full data, and against training shorter: differences of runs of equal seeds."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from infobatch_fast.report.groups import Row, Section, counted
from infobatch_fast.report.methods import FULL
from infobatch_fast.report.page import Block, Table, Text
from infobatch_fast.report.records import Run
from infobatch_fast.report.tables import NONE, SLOWER

AGAINST = "Against full data, and against training shorter: paired over seeds"
CONFIDENCE = 0.95
ONE_SEED = "one seed: noise unknown"
_HOW = (
    "Each difference is of two runs with the same seed and source: against full data of the same "
    "number of epochs, and against the full data of fewer epochs that saw the most nearly equal "
    "number of samples. Points are of the last epoch's accuracy in percent: their mean over n "
    "seeds ± the sample deviation of the differences. Within noise: the two-sided "
    f"{100 * CONFIDENCE:g}% t interval of the differences contains 0. Samples seen are counted "
    "in epochs of all data, and in percent of full data of the same number of epochs; the minutes' "
    "ratio is that of the training to what it is held against."
)
_TWICE = " Runs of one training and one SAME SEED count once, by their mean."


class Pair(NamedTuple):
    """The runs of one seed: of a method, and of what it is held against; no list is empty."""

    mine: list[Run]
    theirs: list[Run]

    @property
    def points(self) -> float:
        """Difference of the last epoch's accuracy in percent."""
        mine, theirs = (_mean(runs, lambda run: run.evaluated[-1]["accuracy"]) for runs in self)
        return 100 * (mine - theirs)

    @property
    def ratio(self) -> float:
        """Of the minutes of training; NaN where the other took none."""
        mine, theirs = (_mean(runs, lambda run: run.minutes) for runs in self)
        return mine / theirs if theirs else math.nan


class Paired(NamedTuple):
    """A row held against others, over the seeds that are in both.

    Attributes:
        row: the one.
        against: what it is held against.
        pairs: by seed.
    """

    row: Row
    against: str
    pairs: dict[int, Pair]

    @property
    def points(self) -> list[float]:
        """The differences of the accuracy."""
        return [pair.points for pair in self.pairs.values()]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The t interval of the points; None of fewer than two seeds."""
        n = len(self.pairs)
        if n < 2:
            return None
        half = quantile(n - 1) * statistics.stdev(self.points) / math.sqrt(n)
        center = statistics.fmean(self.points)
        return center - half, center + half

    @property
    def verdict(self) -> str:
        """What may be said of the difference."""
        if not self.pairs:
            return "no seed in common"
        if self.interval is None:
            return ONE_SEED
        low, high = self.interval
        if low <= 0 <= high:
            return "within noise"
        return "higher" if low > 0 else "lower"


def comparison(section: Section) -> list[Block]:
    """The table of a section's rows that have something to be held against."""
    found = paired(section)
    if not found:
        return []
    cells = []
    for one in found:
        interval = NONE if one.interval is None else "{:+.2f} to {:+.2f}".format(*one.interval)
        mine, theirs = (_epochs(one.pairs.values(), side) for side in (0, 1))
        percent = None if mine is None else 100 * mine / section.setting["epochs"]
        cells.append(
            [
                *(one.row.label, one.against, one.verdict, _signed(one.points), interval),
                *(str(len(one.pairs)), _number(mine, 2), _number(percent, 1), _number(theirs, 2)),
                _ratio(one),
            ]
        )
    headers = ["training", "against", "verdict", "points", f"{100 * CONFIDENCE:g}% interval", "n"]
    headers += ["epochs seen", "% of full data", "the other's epochs"]
    table = Table(AGAINST, [*headers, "minutes ratio"], cells, left=3)
    sides = [runs for one in found for pair in one.pairs.values() for runs in pair]
    return [table, Text(_HOW + _TWICE * any(len(runs) > 1 for runs in sides))]


def paired(section: Section) -> list[Paired]:
    """Each row against full data, and each pruned one against training shorter."""
    epochs = section.setting["epochs"]
    found = []
    for row in section.rows:
        if row.method == FULL and row.epochs == epochs:
            continue
        alike = [r for r in section.rows if r.method == FULL and _source(r) == _source(row)]
        full = [r for r in alike if r.epochs == epochs]
        shorter = [r for r in alike if r.epochs < epochs] if row.method != FULL else []
        found += [_paired(row, rows, epochs) for rows in (full, shorter) if rows]
    return found


def _paired(row: Row, others: Sequence[Row], epochs: int) -> Paired:
    """Each seed against that of the others' runs of it that saw the most nearly as much."""
    pairs: dict[int, Pair] = {}
    held: list[Row] = []
    for seed in sorted({_seed(run) for run in row.runs}):
        mine = _of(row, seed)
        having = [other for other in others if _of(other, seed)]
        if having:
            nearest = min(having, key=partial(_far, mine, seed))
            held.append(nearest)
            pairs[seed] = Pair(mine, _of(nearest, seed))
    return Paired(row, _called(held or others, epochs), pairs)


def _far(mine: Sequence[Run], seed: int, other: Row) -> tuple[float, int]:
    """Orders rows by how little their samples differ, of equals the longer first."""
    seen, theirs = (_mean(runs, lambda run: run.trained) for runs in (mine, _of(other, seed)))
    return abs(theirs - seen), -other.epochs


def _called(rows: Iterable[Row], epochs: int) -> str:
    """What rows of full data are called, without what a pair has in common."""
    least, *_, most = sorted([row.epochs for row in rows] * 2)
    if least == most:
        return FULL.label if most == epochs else f"{FULL.label}, {counted(most, 'epoch')}"
    return f"{FULL.label}, {least} to {most} epochs"


def _source(row: Row) -> str:
    return row.runs[0].about["source_hash"]


def _seed(run: Run) -> int:
    return run.config["seed"]


def _of(row: Row, seed: int) -> list[Run]:
    return [run for run in row.runs if _seed(run) == seed]


def _mean(runs: Iterable[Run], figure: Callable[[Run], float]) -> float:
    return statistics.fmean(figure(run) for run in runs)


def _signed(values: Sequence[float]) -> str:
    if not values:
        return NONE
    text = f"{statistics.fmean(values):+.2f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.2f}"


def _epochs(pairs: Iterable[Pair], side: int) -> float | None:
    """Samples that one side of the pairs saw, in full epochs; None if that is not known."""
    seen = []
    for pair in pairs:
        if any(run.samples is None for run in pair[side]):
            return None
        seen.append(_mean(pair[side], lambda run: run.trained / (run.samples or 1)))
    return statistics.fmean(seen) if seen else None


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _ratio(one: Paired) -> str:
    ratios = [pair.ratio for pair in one.pairs.values()]
    if not ratios or not all(map(math.isfinite, ratios)):
        return NONE
    slow = any(run.watched for pair in one.pairs.values() for runs in pair for run in runs)
    return f"{statistics.fmean(ratios):.3f}" + SLOWER * slow


def quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """How far Student's t lies from 0 at most, either way, with the given confidence.

    Args:
        freedom: degrees of freedom, at least 1.
        confidence: in (0, 1).
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Probability that |T| is at most t: the finite sums of Abramowitz and Stegun, 26.7.3 and 4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
