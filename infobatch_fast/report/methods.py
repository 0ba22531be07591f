"""What a run's epochs leave out, as its row is called, and the reported figures."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from infobatch_fast.pruning import UNWEIGHTED
from infobatch_fast.report.records import Run

DELTA = 0.875  # of the reported runs
# The settings that a method is made of.
SETTINGS = (
    *("ratio", "delta", "policy", "rescale", "anneal"),
    *("score", "ratio_schedule", "target_saving"),
)


class Method(NamedTuple):
    """What an epoch leaves out; two configurations that train alike are the same method.

    Attributes:
        policy: soft (InfoBatch), random, ...; none for full data.
        ratio: r; 0.5 where a target takes its place.
        delta: share of the epochs that prune; 1.0 is without annealing.
        rescale: whether the kept samples are weighted.
        score: what the policy goes by: loss or bls.
        ratio_schedule: how r goes over the epochs: constant or pods.
        target_saving: share of all samples to leave out over the run; None where r is given.
    """

    policy: str
    ratio: float = 0.5
    delta: float = DELTA
    rescale: bool = True
    score: str = "loss"
    ratio_schedule: str = "constant"
    target_saving: float | None = None

    @property
    def label(self) -> str:
        """As it stands in the tables."""
        if self.policy == "none":
            return "full data"
        anneal = self.delta < 1
        how_much = f" r={self.ratio:g}"
        if self.target_saving is not None:
            how_much = f", {100 * self.target_saving:g}% to save"
        delta = f" delta={self.delta:g}" if anneal and self.delta != DELTA else ""
        variant = f", score {self.score}" if self.score != "loss" else ""
        if self.ratio_schedule != "constant":
            variant += f", r by {self.ratio_schedule}"
        if self.policy == "soft" and self.rescale and anneal:
            return f"InfoBatch{how_much}{delta}{variant}"
        parts = " + rescale" * self.rescale + " + anneal" * anneal
        return f"{self.policy}{how_much}{parts}{delta}{variant}"


FULL = Method("none", 0.0, 0.0, False)


class Figures(NamedTuple):
    """The reported figures of a method; None where a figure is not reported."""

    accuracy: float | None  # percent
    minutes: float | None = None
    overhead_hours: float | None = None
    total_hours: float | None = None

    @property
    def hours(self) -> float | None:
        """The minutes in hours."""
        return None if self.minutes is None else self.minutes / 60


# From the InfoBatch paper (arXiv:2303.04947): one A100, CIFAR-10, ResNet-50, 200 epochs, batch 200,
# LARS, max lr 5.2.
REPORTED = {
    FULL: Figures(95.52, 231.10),
    Method("soft", 0.3): Figures(95.50, 184.66),
    Method("soft", 0.5): Figures(95.53, 148.44, 0.057, 2.48),
    Method("soft", 0.7): Figures(95.17, 113.83),
}
# The last is not of the paper: it always keeps the samples of highest loss.
ABLATION = {
    Method("random", delta=1.0, rescale=False): ("random", 95.52),
    Method("soft", delta=1.0, rescale=False): ("soft", 95.60),
    Method("soft", delta=1.0): ("soft + rescale", 95.34),
    Method("soft", rescale=False): ("soft + anneal", 95.59),
    Method("soft"): ("soft + rescale + anneal", 95.53),
    Method("hard", rescale=False): ("hard + anneal", None),
}


def method_of(run: Run) -> Method:
    """What a run's epochs leave out."""
    return of_settings(run.config)


def of_settings(config: Mapping[str, Any]) -> Method:
    """What a run's epochs leave out; older records lack the settings that were added later."""
    target = config.get("target_saving")
    ratio = config["ratio"] if target is None else target
    if config["policy"] == "none" or ratio == 0 or config["delta"] == 0:
        return FULL
    return Method(
        policy=config["policy"],
        ratio=config["ratio"] if target is None else Method._field_defaults["ratio"],
        delta=config["delta"] if config["anneal"] else 1.0,
        rescale=config["rescale"] and config["policy"] not in UNWEIGHTED,
        score=config.get("score", "loss"),
        ratio_schedule=config.get("ratio_schedule", "constant"),
        target_saving=target,
    )
