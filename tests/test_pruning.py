"""`Pruning`: one value for what a run leaves out, read back from whatever names it."""

import pytest

from infobatch_fast.policies import POLICIES, SCORES
from infobatch_fast.pruning import FULL, UNWEIGHTED, Pruning
from infobatch_fast.pruning import SCORES as SCORE_NAMES
from infobatch_fast.train import config

PRUNINGS = {
    "full": Pruning(ratio=0.0),
    "soft-r0.5": Pruning(),
    "soft-r0.7-norescale-noanneal": Pruning(ratio=0.7, rescale=False, anneal=False),
    "hard-save0.25": Pruning("hard", target_saving=0.25),
    "soft-r0.5-d0.5-bls-pods": Pruning(delta=0.5, score="bls", ratio_schedule="pods"),
    "random-r0.5-noanneal": Pruning("random", delta=1.0),
    "mine.easy-r0.1": Pruning("mine:easy", 0.1),
    "hard-r0.1-mine.late": Pruning("hard", 0.1, ratio_schedule="mine:late"),
}
LABELS = {
    "full": "full data",
    "soft-r0.5": "InfoBatch r=0.5",
    "soft-r0.7-norescale-noanneal": "soft r=0.7",
    "hard-save0.25": "hard, 25% to save + anneal",
    "soft-r0.5-d0.5-bls-pods": "InfoBatch r=0.5 delta=0.5, score bls, r by pods",
    "random-r0.5-noanneal": "random r=0.5 + rescale",
    "mine.easy-r0.1": "mine:easy r=0.1 + rescale + anneal",
    "hard-r0.1-mine.late": "hard r=0.1 + anneal, r by mine:late",
}


@pytest.mark.parametrize("slug", PRUNINGS)
def test_names_flags_and_records(slug: str) -> None:
    pruning = PRUNINGS[slug]
    assert (pruning.slug, pruning.label) == (slug, LABELS[slug])
    assert Pruning.of({**pruning.settings(), "epochs": 3}) == pruning
    assert pruning.method.method == pruning.method
    assert pruning.method.label == pruning.label
    if ":" not in pruning.label:
        settings = config.parse(["--preset", "quick", *pruning.flags], cuda=False)
        assert Pruning.of(settings.recorded()).method == pruning.method


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Pruning("none"), FULL),
        (Pruning(delta=0.0), FULL),
        (Pruning("hard"), Pruning("hard", rescale=False)),
        (Pruning(ratio=0.1, target_saving=0.3), Pruning(ratio=0.9, target_saving=0.3)),
        (Pruning(delta=1.0), Pruning(anneal=False)),
    ],
)
def test_what_trains_alike_is_one_method(one: Pruning, other: Pruning) -> None:
    assert one.method == other.method
    assert one.method != Pruning().method


@pytest.mark.parametrize(
    ("epochs", "delta", "first"),
    [(100, 0.29, 29), (200, 0.07, 14), (90, 0.875, 78), (5, 0.875, 4), (10, 1.0, 10), (3, 0.5, 1)],
)
def test_first_full_epoch(epochs: int, delta: float, first: int) -> None:
    assert Pruning(delta=delta).first_full_epoch(epochs) == first
    assert Pruning(delta=delta, anneal=False).first_full_epoch(epochs) == (epochs if delta else 0)


def test_names_that_are_kept_without_torch_are_those_of_the_policies() -> None:
    assert tuple(SCORES) == SCORE_NAMES
    assert set(POLICIES) > UNWEIGHTED
