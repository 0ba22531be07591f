"""What a training cost and saved: differences of runs with equal seeds, and how sure they are."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd

from infobatch_fast.pruning import FULL, Pruning
from infobatch_fast.report.runs import Run, Section
from infobatch_fast.report.text import counted

WIDTH = 0.2  # points; a difference known to ± so much is decided
ALIKE = 0.02  # of full data's samples; a target that was missed by a little stays with its like
_MOST_SEEDS = 1000  # of more the normal distribution tells as well


class Paired(NamedTuple):
    """A training held against another, over the seeds that both have.

    Attributes:
        against: what it is held against.
        points: differences of the last accuracy in percent, by seed.
        saved: share of the other's samples that it did without.
        times: shares of the other's time that it did without, of the pairs of one device and form.
    """

    against: str
    points: pd.Series
    saved: float
    times: pd.Series

    @property
    def time(self) -> float | None:
        """Median of the times, since a busy machine spoils some; None where there are none."""
        return float(self.times.median()) if len(self.times) else None

    @property
    def mean(self) -> float:
        """Of the points."""
        return float(self.points.mean())

    @property
    def half(self) -> float | None:
        """Half the width of the t interval of the points; None of a single seed."""
        n = len(self.points)
        return quantile(n - 1) * float(self.points.std()) / math.sqrt(n) if n > 1 else None

    @property
    def verdict(self) -> str:
        """What may be said of the difference."""
        if self.half is None:
            return "undecided"
        if abs(self.mean) > self.half:
            return "higher" if self.mean > 0 else "lower"
        return "equal" if self.half <= WIDTH else "undecided"

    @property
    def more(self) -> int | None:
        """About how many further seeds would tell it to ± WIDTH; None of a single seed."""
        n = len(self.points)
        return seeds_needed(float(self.points.std()), n) - n if n > 1 else None


@dataclass(frozen=True)
class Training:
    """The complete runs of one section that differ in seed and device alone."""

    label: str
    pruning: Pruning
    epochs: int
    runs: Sequence[Run]

    @property
    def saved(self) -> float:
        """Share of the samples left out, mean over its runs."""
        return statistics.fmean(run.saved_share or 0.0 for run in self.runs)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """By seed the means of its runs; `machine` is "" where they ran on several."""
        rows = [
            (run.config["seed"], run.accuracy, run.trained, run.seconds, f"{run.device} {run.form}")
            for run in self.runs
        ]
        names = ["seed", "accuracy", "trained", "seconds", "machine"]
        one = {"machine": lambda m: m.iloc[0] if m.nunique() == 1 else ""}
        frame = pd.DataFrame(rows, columns=pd.Index(names))
        return frame.groupby("seed").agg(dict.fromkeys(names[1:4], "mean") | one)


def trainings(section: Section) -> list[Training]:
    """Full data, then what prunes with InfoBatch first, then full data for fewer epochs."""
    grouped: dict[str, list[Run]] = {}
    for run in section.runs:
        if run.complete and run.accuracy is not None:
            grouped.setdefault(section.label(run), []).append(run)
    found = [
        Training(label, runs[0].pruning, runs[0].config["epochs"], runs)
        for label, runs in grouped.items()
    ]
    longest = max((of.epochs for of in found if of.pruning != FULL), default=0)

    def place(of: Training) -> tuple[int | bool, ...]:
        how = of.pruning
        kind = int(how != FULL) if how != FULL or of.epochs >= longest else 2
        variant = how.score != "loss" or how.ratio_schedule != "constant"
        return kind, not how.label.startswith("InfoBatch"), variant, -of.epochs

    return sorted(found, key=place)


def against_full(mine: Training, others: Sequence[Training]) -> Paired | None:
    """Against full data of as many epochs; else of the most, if these saw an epoch more or so."""
    full = {of.epochs: of for of in others if of.pruning == FULL}
    if mine.pruning == FULL or not full:
        return None
    longest = full[max(full)]
    if mine.epochs in full:
        return _paired(mine, [full[mine.epochs]])
    more = longest.frame["trained"].mean() - mine.frame["trained"].mean()
    return _paired(mine, [longest], near=False) if more > mine.runs[0].size else None


def against_shorter(mine: Training, others: Sequence[Training]) -> Paired | None:
    """Against full data of fewer epochs that saw as many samples, to one epoch."""
    full = [of for of in others if of.pruning == FULL and of.epochs < mine.epochs]
    return _paired(mine, full) if mine.pruning != FULL else None


def by_budget(rows: Sequence[Training]) -> list[list[tuple[float, Training, Paired | None]]]:
    """Trainings that saw equally many samples, to ALIKE, each against the longest of full data.

    Returns:
        Groups from most samples to fewest, full data first in each, of those in which something
        that prunes has a rival: shares of the longest's samples, and the trainings.
    """
    longest = max((of for of in rows if of.pruning == FULL), key=lambda of: of.epochs, default=None)
    if longest is None:
        return []
    samples = longest.frame["trained"].mean()
    found = [
        (
            float(row.frame["trained"].mean() / samples),
            row,
            None if row is longest else _paired(row, [longest], near=False),
        )
        for row in sorted(rows, key=lambda row: row.pruning != FULL)
    ]
    most: list[float] = []  # of each group's shares
    for share in sorted((share for share, *_ in found), reverse=True):
        if not most or most[-1] - share > ALIKE:
            most.append(share)
    groups = [[of for of in found if 0 <= top - of[0] <= ALIKE] for top in most]
    return [group for group in groups if len(group) > 1 and group[-1][1].pruning != FULL]


def shorter_epochs(run: Run) -> int:
    """So many epochs of full data see as many samples as the run did."""
    return max(1, round(run.trained / run.size))


def _paired(mine: Training, others: Sequence[Training], near: bool = True) -> Paired | None:
    """Each seed against the run of it that saw the most nearly equal number of samples.

    With near, fewer epochs count as many where their samples are as many to one epoch.
    """
    if not others:
        return None
    theirs = pd.concat([of.frame.assign(epochs=of.epochs) for of in others])
    both = mine.frame.merge(theirs, on="seed", suffixes=("", "_other")).reset_index()
    both["far"] = (both["trained"] - both["trained_other"]).abs()
    if near and others[0].epochs != mine.epochs:
        both = both[both["far"] <= mine.runs[0].size]
    both = both.sort_values(["far", "epochs"]).drop_duplicates("seed").sort_values("seed")
    if both.empty:
        return None
    lengths = [counted(of, "epoch") for of in sorted({*both["epochs"]} - {mine.epochs})]
    timed = both[(both["machine"] == both["machine_other"]) & (both["machine"] != "")]
    return Paired(
        FULL.label + f", {' or '.join(lengths)}" * bool(lengths),
        (both["accuracy"] - both["accuracy_other"]).set_axis(both["seed"]),
        1 - float((both["trained"] / both["trained_other"]).mean()),
        1 - timed["seconds"] / timed["seconds_other"],
    )


def seeds_needed(deviation: float, least: int = 2) -> int:
    """The fewest seeds, `least` or more, whose t interval is within ± WIDTH for that deviation."""
    n = max(least, int((1.96 * deviation / WIDTH) ** 2))  # what a normal distribution needs
    while n < _MOST_SEEDS and quantile(n - 1) * deviation / math.sqrt(n) > WIDTH:
        n += 1
    return n


def quantile(freedom: int) -> float:
    """How far Student's t lies from 0 at most, either way, in 95% of cases.

    Of few degrees of freedom from a table, else by Abramowitz and Stegun, 26.7.5.
    """
    few = (12.7062, 4.3027, 3.1824, 2.7764)
    if freedom <= len(few):
        return few[freedom - 1]
    return sum(c / freedom**k for k, c in enumerate((1.95996, 2.37227, 2.8225, 2.55585, 1.58953)))
