"""What a run's epochs leave out, as one value: checked once, and named alike everywhere."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from numbers import Real
from typing import Any

from infobatch_fast.errors import unknown_name

DELTA = 0.875  # of the reported runs
SCORES = ("loss", "bls")
# Policies that never weight what they keep, so that rescaling changes nothing.
UNWEIGHTED = frozenset({"hard", "orderdp", "ucb", "seta", "none"})


@dataclass(frozen=True)
class Pruning:
    """The settings that say which samples the epochs of a run leave out, and with what weights.

    Attributes:
        policy: soft (InfoBatch), random, hard, orderdp, repb, ucb, seta or none, see
            docs/policies.md; or `module:function`.
        ratio: r, the share of the prunable samples that an epoch leaves out, in [0, 1).
        delta: share of the epochs that prune, in [0, 1], counting the first, which is full, as
            nothing has a score yet; the rest train on all. 0 is full data.
        rescale: weight the prunable samples that were kept, so that the expected gradient stays
            the same.
        anneal: train on all data in the last (1 - delta) of the epochs; False prunes to the end.
        score: what a sample is judged by: loss, its own last one; or bls, a running mean of the
            losses of its batches.
        ratio_schedule: constant; pods, which swings the ratio around its mean; or a function of
            your own as `module:function`, which gives each epoch's ratio.
        target_saving: share of the samples of all epochs to leave out, in (0, 1); each epoch's
            ratio is then solved from its scores, and `ratio` is not used.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    policy: str = "soft"
    ratio: float = 0.5
    delta: float = DELTA
    rescale: bool = True
    anneal: bool = True
    score: str = "loss"
    ratio_schedule: str = "constant"
    target_saving: float | None = None

    def __post_init__(self) -> None:
        for name in ("ratio", "delta", "target_saving"):
            value = getattr(self, name)
            if isinstance(value, Real):  # numpy's are none that a state is loadable with
                object.__setattr__(self, name, float(value))
            elif value is not None or name != "target_saving":
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be in [0, 1], got {self.delta}")
        if self.target_saving is not None and not 0 < self.target_saving < 1:
            raise ValueError(f"target_saving must be in (0, 1), got {self.target_saving}")
        if self.score not in SCORES:
            raise ValueError(unknown_name("score", self.score, SCORES))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Pruning":
        """The pruning among a run's settings; older records lack what was added later."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: settings[name] for name in names & settings.keys()})

    def settings(self) -> dict[str, Any]:
        """The values by their names, as JSON types."""
        return asdict(self)

    def first_full_epoch(self, num_epochs: int) -> int:
        """The first epoch, from 0, of those at the end that train on all samples.

        It is floor(num_epochs * delta), as the original counts, with delta as it was written:
        floats get products such as 100 * 0.29 wrong (28.999999999999996).
        """
        if not self.anneal and self.delta > 0:
            return num_epochs
        return math.floor(num_epochs * Fraction(str(float(self.delta))))

    @property
    def full_data(self) -> bool:
        """Whether no epoch leaves out anything."""
        asked = self.ratio if self.target_saving is None else self.target_saving
        return self.policy == "none" or asked == 0 or self.delta == 0

    @property
    def method(self) -> "Pruning":
        """The one that stands for all prunings that train alike."""
        if self.full_data:
            return FULL
        return replace(
            self,
            ratio=self.ratio if self.target_saving is None else Pruning.ratio,
            delta=self.delta if self.anneal else 1.0,
            rescale=self.rescale and self.policy not in UNWEIGHTED,
            anneal=self.anneal and self.delta < 1,
        )

    @property
    def label(self) -> str:
        """As it stands in tables: "InfoBatch r=0.5", "hard, 25% to save + anneal"."""
        if self.full_data:
            return "full data"
        of = self.method
        much = f" r={of.ratio:g}"
        if of.target_saving is not None:
            much = f", {100 * of.target_saving:g}% to save"
        delta = f" delta={of.delta:g}" if of.anneal and of.delta != DELTA else ""
        variant = f", score {of.score}" if of.score != "loss" else ""
        if of.ratio_schedule != "constant":
            variant += f", r by {of.ratio_schedule}"
        if of.policy == "soft" and of.rescale and of.anneal:
            return f"InfoBatch{much}{delta}{variant}"
        parts = " + rescale" * of.rescale + " + anneal" * of.anneal
        return f"{of.policy}{much}{parts}{delta}{variant}"

    @property
    def slug(self) -> str:
        """As a part of a file's name: "soft-r0.5", "hard-save0.25"."""
        if self.full_data:
            return "full"
        target = self.target_saving
        parts = [
            self.policy.replace(":", "."),
            f"r{self.ratio:g}" if target is None else f"save{target:g}",
            *[f"d{self.delta:g}"] * (self.delta not in (DELTA, 1.0)),
            *[self.score] * (self.score != "loss"),
            *[self.ratio_schedule.replace(":", ".")] * (self.ratio_schedule != "constant"),
            *["norescale"] * (not self.rescale),
            *["noanneal"] * (not self.anneal or self.delta == 1),
        ]
        return "-".join(parts)

    @property
    def flags(self) -> list[str]:
        """The trainer's command line that asks for it, whatever the preset."""
        if self.full_data:
            return ["--delta", "0.0"]
        words = ["--policy", self.policy]
        if self.target_saving is None:
            words += ["--ratio", str(self.ratio)]
        else:
            words += ["--target-saving", str(self.target_saving)]
        for name in ("delta", "score", "ratio_schedule"):
            value = getattr(self, name)
            if value != getattr(Pruning, name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words + ["--no-rescale"] * (not self.rescale) + ["--no-anneal"] * (not self.anneal)


FULL = Pruning(policy="none", ratio=0.0, delta=0.0, rescale=False, anneal=False)
