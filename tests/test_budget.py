"""How many samples an epoch leaves out: schedules, and a share of the run that is aimed at."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from infobatch_fast import InfoBatch
from infobatch_fast.budget import (
    PODS_PERIOD,
    PODS_SWING,
    SCHEDULES,
    Budget,
    pods,
    scheduled_ratio,
    spend,
    to_save,
)
from infobatch_fast.plan import Plan
from infobatch_fast.policies import find_schedule as named
from infobatch_fast.telemetry.syncs import host_syncs


@pytest.mark.parametrize("n", [1, 2, 3, 127, 5000, 50_000])
def test_kept_on_device_is_the_number_kept(n: int) -> None:
    for ratio in (0.0, 0.1, 0.3, 0.5, 0.7, 0.999):
        budget = Budget(ratio)
        assert budget.kept(n) == pytest.approx(n - ratio * n, rel=1e-12)
        with host_syncs(torch.device("cpu"), "forbid"):
            kept = budget.kept_on_device(torch.tensor(n))
        assert kept.dtype == torch.int64
        assert kept.item() == max(1, round((1 - ratio) * n))
        assert budget.prunes == (ratio > 0)
    for number in (0.0, 0.5, 1.0, 1.5, n / 3, n - 1.0, float(n), n + 7.5):
        budget = Budget(0.9, number)  # the ratio is not used
        assert budget.kept(n) == max(0.0, n - number)
        assert budget.kept_on_device(torch.tensor(n)).item() == max(1, round(n - number))
        assert budget.prunes == (number > 0)


# Spending

SHARES = (0.9, 0.75, 0.6, 0.5, 0.25)


@pytest.mark.parametrize("num_epochs", [4, 5, 10, 16, 90, 200])
@pytest.mark.parametrize("share", SHARES)
def test_a_budget_is_spent_by_as_many_epochs_as_may_be(share: float, num_epochs: int) -> None:
    if share * num_epochs in (1.25, 1.5):  # of one epoch, or two, none prunes
        with pytest.raises(ValueError, match=f"got {share} of {num_epochs} epochs"):
            spend(share, num_epochs)
        return
    epochs, pruning = spend(share, num_epochs)
    saving = pruning.get("target_saving", 0.0)
    assert isinstance(saving, float)
    assert epochs * (1 - saving) == pytest.approx(share * num_epochs)
    assert saving < 1 / 3 + 1e-6
    if epochs < num_epochs and num_epochs > 5:
        assert 1 - share * num_epochs / (epochs + 1) > 1 / 3  # one more would leave out too much


@pytest.mark.parametrize("num_epochs", [8, 16, 30])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("batch", [None, 25])
def test_a_budget_is_hit_within_half_a_percent(
    share: float, num_epochs: int, batch: int | None
) -> None:
    epochs, pruning = spend(share, num_epochs)
    infobatch = InfoBatch(1003, epochs, device="cpu", **pruning)
    generator, trained = torch.Generator().manual_seed(1), 0
    for epoch in range(epochs):
        plan = infobatch.sample(epoch, batch)
        infobatch.record(torch.rand(len(plan), generator=generator), plan.batch(0, len(plan)))
        trained += len(plan)
    assert trained / (1003 * num_epochs) == pytest.approx(share, rel=0.005)


def test_a_budget_is_spent_in_the_epochs_it_was_counted_for() -> None:
    epochs, pruning = spend(0.9, num_epochs=2, delta=1.0)
    infobatch = InfoBatch(1000, epochs, device="cpu", **pruning)
    plan = infobatch.sample(0)
    infobatch.record(torch.rand(1000), plan.batch(0, 1000))
    assert len(infobatch.sample(1)) == 800


@pytest.mark.parametrize(
    ("share", "epochs", "words"),
    [(1.0, 10, r"budget must be in \(0, 1\), got 1.0"), (0.6, 2, "budget .* got 0.6 of 2 epochs")],
)
def test_budgets_that_cannot_be_spent(share: float, epochs: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spend(share, epochs)


# Schedules

FIRST_FULL = [*range(0, 40), 79, 175, 200, 201]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 0.5, 0.7, 0.999])
def test_the_mean_ratio_is_the_ratio(ratio: float, schedule: str) -> None:
    for first_full in FIRST_FULL:
        ratios = [scheduled_ratio(ratio, named(schedule), e, first_full) for e in range(first_full)]
        assert all(0 <= r < 1 for r in ratios)
        if first_full > 1:
            mean = math.fsum(ratios[1:]) / (first_full - 1)
            assert mean == pytest.approx(ratio, rel=0, abs=1e-12)
        if schedule == "constant" or ratio == 0 or first_full < 5:
            assert set(ratios) <= {ratio}
        else:
            assert len(set(ratios[1:])) > 1
            assert max(ratios) <= ratio + PODS_SWING * min(ratio, 1 - ratio) + 1e-12
            assert min(ratios) >= ratio - PODS_SWING * min(ratio, 1 - ratio) - 1e-12


def test_pods_alternates_from_much_data_to_little() -> None:
    ratios = np.array([scheduled_ratio(0.5, named("pods"), epoch, 41) for epoch in range(1, 41)])
    # Four periods of ten epochs each: in the middle four above the mean, two on it.
    np.testing.assert_allclose(ratios, np.tile(ratios[:10], 4), atol=1e-12)
    assert [epoch for epoch in range(10) if ratios[epoch] > 0.5 + 1e-12] == [3, 4, 5, 6]
    np.testing.assert_allclose(ratios[:10], ratios[:10][::-1], atol=1e-12)
    assert ratios[0] == pytest.approx(ratios.min())
    assert ratios.min() < 0.27
    assert ratios[4] == pytest.approx(ratios.max())
    assert ratios.max() > 0.73
    for first_full, periods in ((5, 1), (15, 1), (17, 2), (26, 2), (175, 17)):
        above = [pods(0.5, epoch, first_full) > 0.5 + 1e-12 for epoch in range(1, first_full)]
        rises = sum(b and not a for a, b in pairwise(above))
        assert rises == periods == max(1, round((first_full - 1) / PODS_PERIOD))


def test_the_plans_follow_the_schedule() -> None:
    infobatch = InfoBatch(1000, 40, 0.4, 0.875, device="cpu", policy="hard", ratio_schedule="pods")
    infobatch.scores.copy_(torch.arange(1000.0))
    ratios = []
    for epoch in range(40):
        plan = infobatch.sample(epoch)
        expected = 0.0 if epoch >= 35 else scheduled_ratio(0.4, named("pods"), epoch, 35)
        assert plan.ratio == pytest.approx(expected, abs=1e-12)
        assert plan.expected_saving == plan.ratio * plan.num_prunable / 1000
        assert len(plan) == 1000 - plan.num_prunable + round((1 - expected) * plan.num_prunable)
        ratios.append(plan.ratio)
    assert np.mean(ratios[1:35]) == pytest.approx(0.4, abs=1e-12)
    assert len({round(ratio, 6) for ratio in ratios[1:35]}) > 5


def late(ratio: float, epoch: int, first_full_epoch: int) -> float:
    """Leaves out ever more: twice the ratio at the end."""
    return 2 * ratio * epoch / first_full_epoch


@pytest.mark.parametrize("schedule", [late, f"{__name__}:late"])
def test_a_schedule_of_ones_own(schedule) -> None:
    infobatch = aiming(None, policy="hard", ratio=0.4, ratio_schedule=schedule)
    plans = simulate(infobatch)
    ratios = [late(0.4, epoch, 11) for epoch in range(1, 11)]
    assert [plan.ratio for plan in plans[1:11]] == pytest.approx(ratios, rel=1e-12)
    state = infobatch.state_dict()
    assert state["ratio_schedule"] == f"{__name__}:late"
    aiming(None, policy="hard", ratio=0.4, ratio_schedule=late).load_state_dict(state)
    with pytest.raises(ValueError, match=r"^ratio_schedule of the state must be constant, got"):
        aiming(None, policy="hard", ratio=0.4).load_state_dict(state)
    plans = simulate(aiming(0.3, policy="hard", ratio_schedule=schedule))
    parts = [3600 * epoch / sum(range(1, 11)) for epoch in range(1, 11)]
    assert [1000 - len(plan) for plan in plans[1:11]] == pytest.approx(parts, abs=1)
    assert saved(plans) == 3600


NOTHING = 3


@pytest.mark.parametrize(
    ("schedule", "target", "message"),
    [
        (late, None, r"\S+:late must give ratios in \[0, 1\), got 1.08982 in epoch 6"),
        (
            lambda *_: -0.1,
            0.3,
            r"\S+<lambda> must give .* in \[0, inf\), got -0.1 in epoch 1",
        ),
        (lambda *_: math.nan, None, r"\S+ must give .* got nan in epoch 1"),
        (lambda *_: None, None, r"\S+<lambda> failed: TypeError: .*"),
        (lambda *_: 1 / 0, 0.3, r"\S+<lambda> failed: ZeroDivisionError: .*"),
        (f"{__name__}:NOTHING", None, r"\S+:NOTHING failed: TypeError: .*"),
        (f"{__name__}:absent", None, r"\S+:absent cannot be imported: .*"),
        ("lat", None, "must be one of constant, pods, module:function, got lat"),
    ],
)
def test_a_schedule_that_gives_no_ratio_is_refused_at_once(schedule, target, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ratio_schedule {message}$"):
        aiming(target, ratio=0.999, ratio_schedule=schedule)


# A share of the whole run


def test_to_save_by_hand() -> None:
    flat = named("constant")
    assert to_save(90, 100, flat, 0, 10) == 0  # the first epoch has no scores
    assert to_save(90, 100, flat, 1, 10) == 10
    assert to_save(90, 100, flat, 9, 10) == 90
    assert to_save(-1, 100, flat, 5, 10) == 0
    assert to_save(90, 100, flat, 1, 1) == 0
    for schedule in SCHEDULES:
        left, parts = 1000.0, []
        for epoch in range(1, 31):
            parts.append(to_save(left, 100, named(schedule), epoch, 31))
            left -= parts[-1]
        assert left == pytest.approx(0, abs=1e-9)
        shape = [100 * SCHEDULES[schedule](1 / 3, e, 31) for e in range(1, 31)]
        assert parts == pytest.approx(shape, rel=1e-9)


def simulate(infobatch: InfoBatch, batch_size: int | None = None, flat: int = 0) -> list[Plan]:
    """A run with losses of their own each epoch; they are all alike in the first `flat` ones."""
    rng = np.random.default_rng(infobatch.seed)
    plans = []
    for epoch in range(infobatch.num_epochs):
        losses = rng.gamma(1.0, 1.0, infobatch.num_samples).astype(np.float32)
        if epoch < flat:
            losses[:] = 1
        plan = infobatch.sample(epoch, batch_size)
        plans.append(plan)
        for batch in plan.batches(500):
            infobatch.update(torch.from_numpy(losses[batch.indices.numpy()]), batch)
    return plans


def aiming(target: float | None, n: int = 1000, epochs: int = 12, **kwargs) -> InfoBatch:
    # Of twelve epochs eleven prune.
    return InfoBatch(n, epochs, device="cpu", target_saving=target, **{"delta": 0.92, **kwargs})


def saved(plans: list[Plan]) -> int:
    return sum(plan.num_samples - len(plan) for plan in plans)


@pytest.mark.parametrize("n", [127, 1000, 1003])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("policy", "target"),
    [("soft", 0.3), ("hard", 0.4), ("repb", 0.2), ("random", 0.333), ("ucb", 0.5), ("seta", 0.1)],
)
def test_a_target_is_reached_to_a_sample(policy: str, target: float, schedule: str, n: int) -> None:
    infobatch = aiming(target, n, policy=policy, ratio_schedule=schedule)
    plans = simulate(infobatch)
    weighted = policy in ("soft", "random")
    assert infobatch.most_saving == pytest.approx(10 / 12 * (0.9 if weighted else 1))
    assert max(plan.ratio for plan in plans) < 1
    assert abs(saved(plans) - target * n * 12) <= 0.5
    expected = math.fsum(plan.expected_saving for plan in plans) / 12
    assert expected == pytest.approx(target, abs=1 / n)
    assert len(plans[0]) == len(plans[-1]) == n
    parts = [n - len(plan) for plan in plans[1:11]]
    if schedule == "constant":
        assert max(parts) - min(parts) <= 1
    else:
        assert max(parts) > 1.5 * min(parts)
    for plan in plans[1:11]:
        assert plan.ratio * plan.num_prunable == pytest.approx(n - len(plan), abs=0.51)


def test_the_ratio_is_not_used_with_a_target() -> None:
    one, other = (simulate(aiming(0.3, ratio=ratio)) for ratio in (0.0, 0.9))
    assert saved(one) == saved(other) == 3600
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(one, other, strict=True))


def test_a_target_with_whole_batches() -> None:
    for policy in ("soft", "hard"):
        plans = simulate(aiming(0.3, 1003, policy=policy), 64)
        assert all(len(plan) % 64 == 0 for plan in plans[1:11])
        assert abs(saved(plans) - 0.3 * 1003 * 12) <= 32


def test_a_shortfall_is_caught_up_later() -> None:
    # With equal scores soft can leave out nothing for four epochs; the other seven make up for it.
    plans = simulate(aiming(0.3), flat=3)
    assert [len(plan) for plan in plans[:4]] == [1000] * 4
    parts = [1000 - len(plan) for plan in plans[4:11]]
    assert sum(parts) == 3600
    assert max(parts) - min(parts) <= 1


def test_a_high_target_swings_less() -> None:
    # Of 84% on average a swing by half would ask for more than all of some epochs.
    plans = simulate(aiming(0.7, policy="hard", ratio_schedule="pods"))
    ratios = [plan.ratio for plan in plans[1:11]]
    assert saved(plans) == 8400
    assert max(ratios) < 1
    assert max(ratios) - min(ratios) > 0.15


def test_a_target_out_of_reach_leaves_out_all_it_can() -> None:
    infobatch = aiming(0.8)
    plans = simulate(infobatch)
    for plan in plans[1:11]:
        n = plan.num_prunable
        assert plan.ratio == pytest.approx(0.9)
        assert len(plan) == 1000 - n + round(0.1 * n)
        assert plan.weights.max() < 10.1
    assert saved(plans) < 0.8 * 12_000
    assert saved(plans) / 12_000 < infobatch.most_saving
    for plan in simulate(aiming(0.8, rescale=False))[1:11]:
        assert plan.ratio == 1
        assert len(plan) == 1000 - plan.num_prunable + 1  # one is always kept
    for target in (0.9, 0.999):  # beyond what any policy could
        plans = simulate(aiming(target, policy="hard"))
        assert [len(plan) for plan in plans] == [1000] + [1] * 10 + [1000]
    assert saved(simulate(aiming(0.3, policy="none"))) == 0


@pytest.mark.parametrize(
    ("epochs", "kwargs", "most"),
    [
        (12, {}, 10 / 12),
        (200, {"delta": 0.875}, 174 / 200),
        (12, {"anneal": False}, 11 / 12),
        (12, {"delta": 0.0}, 0),
        (1, {}, 0),
        (10, {"delta": 0.1}, 0),
    ],
)
def test_most_saving(epochs: int, kwargs: dict, most: float) -> None:
    infobatch = aiming(0.999, 50, epochs, policy="hard", **kwargs)
    assert infobatch.most_saving == pytest.approx(most, abs=1e-12)
    share = saved(simulate(infobatch)) / (50 * epochs)
    assert share == pytest.approx(most * 49 / 50)  # one sample is kept


def test_an_epoch_drawn_twice_is_counted_once() -> None:
    infobatch = aiming(0.3, policy="hard")
    infobatch.scores.copy_(torch.arange(1000.0))
    total = 0
    for epoch in range(12):
        infobatch.sample(epoch)
        first, second = infobatch.sample(epoch), infobatch.sample(epoch)
        assert torch.equal(first.indices, second.indices)
        total += 1000 - len(second)
    assert total == 3600
