"""Every policy against a brute-force form in plain loops, its statistics, and its properties."""

import copy
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from infobatch_fast import Batch, InfoBatch, policies
from infobatch_fast import infobatch as infobatch_module
from infobatch_fast.budget import Budget
from infobatch_fast.kernels import reference, twin
from infobatch_fast.plan import Plan
from infobatch_fast.policies import POLICIES, Choice, History, Policy, View
from infobatch_fast.pruning import UNWEIGHTED
from infobatch_fast.telemetry.syncs import host_syncs

CPU = torch.device("cpu")


# The kernels' twins in torch, which take the way of a GPU through `InfoBatch`.
TWINS = SimpleNamespace(
    threshold=reference.threshold,
    partition=twin.partition,
    choose=twin.choose,
    shuffle=twin.shuffle,
    record=reference.record,
)


@pytest.fixture(params=["torch", "kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernels":
        monkeypatch.setattr(infobatch_module, "triton_kernels", lambda device: TWINS)
    return request.param


SIGMAS = 4
EPOCHS = 7
REMEMBERS = ("repb", "ucb")


def losses_of(n: int, epochs: int, kind: str, seed: int = 0) -> np.ndarray:
    """What each sample's loss would be in each epoch, (E, N) float32, some NaN.

    `grid` has many equal ones; their sums are exact, so that a mean can be compared with.
    """
    rng = np.random.default_rng([n, seed])
    losses = rng.gamma(1.0, 1.0, (epochs, n))
    if kind == "grid":
        losses = np.round(losses * 4) / 4
    if kind == "equal":
        losses = np.full((epochs, n), 0.1)
    elif n > 2:
        losses[rng.random((epochs, n)) < 0.05] = np.nan
    return losses.astype(np.float32)


class Past(NamedTuple):
    """An epoch that was: its samples in their order, and their losses."""

    order: list[int]
    losses: list[float]


def train_on(infobatch: InfoBatch, plan: Plan, losses: np.ndarray) -> Past:
    order = plan.indices.tolist()
    for batch in plan.batches(max(1, len(plan) // 3)):
        infobatch.update(torch.from_numpy(losses[batch.indices.numpy()]), batch)
    return Past(order, [float(losses[i]) for i in order])


def run(infobatch: InfoBatch, losses: np.ndarray, epochs: range) -> list[Plan]:
    plans = []
    for epoch in epochs:
        plans.append(infobatch.sample(epoch))
        train_on(infobatch, plans[-1], losses[epoch])
    return plans


def make(n: int, policy: str, *, epochs: int = EPOCHS, **kwargs) -> InfoBatch:
    return InfoBatch(n, epochs, **{"delta": 1.0, "device": "cpu", "policy": policy, **kwargs})


def history_of(order: torch.Tensor, n: int) -> History:
    once = torch.zeros(n, dtype=torch.int32).index_fill(0, order, 1)
    return History(order, once, once - 1)


def view_of(scores: np.ndarray, order: torch.Tensor | None = None, **kwargs) -> View:
    tensor = torch.from_numpy(scores.astype(np.float32))
    history = None if order is None else history_of(order, len(scores))
    kwargs = {"epoch": 1, "tail": 9, **kwargs, "history": history}
    return View(tensor, **kwargs, budget=Budget(0.5), key=0)


# The brute-force forms: of the epochs so far and the scores, the samples that may be left out, a
# rank of each (those of lower rank go first; None where all are alike) and its weight if kept
# (None where it is n/k).


class Brute(NamedTuple):
    may_go: set[int]
    rank: dict[int, float] | None = None
    weights: dict[int, float] | None = None


def below_mean(values: dict[int, float]) -> set[int]:
    finite = {i: Fraction(v) for i, v in values.items() if math.isfinite(v)}
    if not finite:
        return set()
    mean = sum(finite.values(), Fraction(0)) / len(finite)
    return {i for i, value in finite.items() if value < mean}


def seen(scores: list[float]) -> set[int]:
    return {i for i, score in enumerate(scores) if math.isfinite(score)}


def ones(scores: list[float]) -> dict[int, float]:
    return {i: 1.0 for i in range(len(scores))}


def soft(history: list[Past], scores: list[float]) -> Brute:
    return Brute(below_mean(dict(enumerate(scores))))


def random(history: list[Past], scores: list[float]) -> Brute:
    return Brute(seen(scores))


def hard(history: list[Past], scores: list[float]) -> Brute:
    return Brute(seen(scores), dict(enumerate(scores)), ones(scores))


def repb(history: list[Past], scores: list[float]) -> Brute:
    last = history[-1].order
    may_go = seen(scores) - set(last)
    for start in range(0, len(last), 200):
        may_go |= below_mean({i: scores[i] for i in last[start : start + 200]})
    times = [0] * len(scores)
    for past in history:
        for i in past.order:
            times[i] += 1
    # Of a sample that is kept, this epoch counts on both sides.
    weights = {i: (len(history) + 1) / (times[i] + 1) for i in range(len(scores))}
    return Brute(may_go, None, weights)


def ucb(history: list[Past], scores: list[float]) -> Brute:
    had: dict[int, list[float]] = {}
    for past in history:
        for i, loss in zip(past.order, past.losses, strict=True):
            if math.isfinite(loss):
                had.setdefault(i, []).append(loss)
    rank = {}
    for i, losses in had.items():
        mean = variance = 0.0
        for loss in losses:
            variance = 0.2 * variance + 0.8 * (loss - mean) ** 2
            mean = 0.2 * mean + 0.8 * loss
        rank[i] = mean + math.sqrt(variance)
    return Brute(seen(scores), rank, ones(scores))


def none(history: list[Past], scores: list[float]) -> Brute:
    return Brute(set())


# seta and orderdp are drawn by lot among more than one rank: they have tests of their own, and here
# only what may go and how many.
def unranked(history: list[Past], scores: list[float]) -> Brute:
    return Brute(seen(scores), None, ones(scores))


BRUTE = {
    "soft": soft,
    "random": random,
    "hard": hard,
    "orderdp": unranked,
    "repb": repb,
    "ucb": ucb,
    "seta": unranked,
    "none": none,
}


def check_plan(plan: Plan, brute: Brute, n: int, ratio: float) -> None:
    indices = plan.indices.tolist()
    kept, prunable = set(indices), len(brute.may_go)
    k = max(1, round((1 - ratio) * prunable)) if prunable else 0
    assert plan.num_prunable == prunable
    assert len(indices) == len(kept) == n - prunable + k
    assert set(range(n)) - kept <= brute.may_go
    assert plan.expected_saving == pytest.approx(ratio * prunable / n, abs=1e-12)
    weights = dict(zip(indices, plan.weights.tolist(), strict=True))
    for i in indices:
        expected = prunable / k if i in brute.may_go else 1.0
        if brute.weights is not None:
            expected = brute.weights[i]
        assert weights[i] == float(np.float32(expected))
    if brute.rank is not None and kept < set(range(n)):
        gone = max(brute.rank[i] for i in set(range(n)) - kept)
        stays = min(brute.rank[i] for i in kept & brute.may_go)
        assert gone <= stays + 1e-5 * abs(stays)


def test_every_policy_has_a_brute_force_form() -> None:
    assert list(BRUTE) == list(POLICIES)
    assert [name for name, policy in POLICIES.items() if policy.history] == list(REMEMBERS)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["gamma", "grid", "equal"])
@pytest.mark.parametrize("n", [1, 2, 127, 5000])
@pytest.mark.parametrize("name", BRUTE)
def test_policy_against_brute_force(name: str, n: int, kind: str) -> None:
    for ratio in (0.3, 0.7) if n < 5000 else (0.5,):
        losses = losses_of(n, EPOCHS, kind)
        infobatch = make(n, name, ratio=ratio)
        history: list[Past] = []
        for epoch in range(EPOCHS if n < 5000 else 4):
            plan = infobatch.sample(epoch)
            if epoch == 0:
                assert sorted(plan.indices.tolist()) == list(range(n))
                assert plan.expected_saving == 0
                assert (plan.weights == 1).all()
            else:
                check_plan(plan, BRUTE[name](history, infobatch.scores.tolist()), n, ratio)
            history.append(train_on(infobatch, plan, losses[epoch]))


@pytest.mark.usefixtures("way")
def test_policies_do_prune_and_differ() -> None:
    # So that the test above is about something: what each leaves out of the same 1000 losses.
    losses = np.tile(losses_of(1000, 1, "gamma"), (3, 1))
    gone = {}
    for name in POLICIES:
        plan = run(make(1000, name), losses, range(3))[1]
        gone[name] = frozenset(range(1000)) - set(plan.indices.tolist())
    finite = int(np.isfinite(losses[0]).sum())
    below = int((losses[0] < np.nanmean(losses[0])).sum())
    for name in ("random", "hard", "orderdp", "ucb", "seta"):
        assert len(gone[name]) == finite - round(finite / 2)
    assert len(gone["soft"]) == below - round(below / 2)
    assert abs(len(gone["repb"]) - len(gone["soft"])) < 30
    assert gone["hard"] == gone["ucb"]  # after one epoch the deviation goes with the loss
    assert len(set(gone.values())) == len(POLICIES) - 1


# By lot


def kept_counts(name: str, scores: np.ndarray, runs: int, **kwargs) -> np.ndarray:
    counts = np.zeros(len(scores))
    for seed in range(runs):
        infobatch = make(len(scores), name, seed=seed, **kwargs)
        infobatch.scores.copy_(torch.from_numpy(scores.astype(np.float32)))
        infobatch._epoch = 0  # as if the first was drawn
        counts[infobatch.sample(1).indices.numpy()] += 1
    return counts


def assert_equally_often(counts: np.ndarray, runs: int, share: float) -> None:
    assert np.abs(counts - runs * share).max() < SIGMAS * math.sqrt(runs * share * (1 - share))
    assert counts.std() > 0


def test_ties_are_broken_by_lot() -> None:
    # 4 low, 12 equal, 8 high, of which half are kept: the high and 4 of the equal.
    scores = np.array([1.0] * 4 + [2.0] * 12 + [3.0] * 8)[np.random.default_rng(0).permutation(24)]
    counts = kept_counts("hard", scores, 1000)
    assert (counts[scores == 1] == 0).all()
    assert (counts[scores == 3] == 1000).all()
    assert_equally_often(counts[scores == 2], 1000, 4 / 12)


@pytest.mark.parametrize("priority", [False, True])
def test_choose_with_a_priority_draws_the_order_apart(priority: bool) -> None:
    prunable = torch.tensor([True] * 6 + [False] * 3)
    ranks = torch.tensor([5.0, 1, 3, 3, 3, 0, torch.nan, torch.nan, torch.nan])
    runs, places, ties = 1000, np.zeros((9, 6)), np.zeros(9)
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        indices, weights = reference.choose(
            prunable, 6, 3, 2.0, generator, ranks if priority else None
        )
        order = indices.tolist()
        assert len(set(order)) == 6
        assert weights.tolist() == [2.0 if i < 6 else 1.0 for i in order]
        places[order, range(6)] += 1
        ties[order] += 1
    assert (ties[6:] == runs).all()
    if priority:
        assert ties[0] == runs
        assert (ties[[1, 5]] == 0).all()
        assert_equally_often(ties[2:5], runs, 2 / 3)
    else:
        assert_equally_often(ties[:6], runs, 1 / 2)
    share = ties[:, None] / runs / 6  # every place is as likely
    spread = np.sqrt(runs * share * (1 - share))
    assert (np.abs(places - runs * share) <= SIGMAS * spread).all()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 5), (8, 0)])
def test_choose_with_a_priority_at_the_edges(n: int, k: int) -> None:
    ranks = torch.arange(n).float()
    generator = torch.Generator().manual_seed(1)
    indices, _ = reference.choose(torch.ones(n, dtype=torch.bool), n, k, 1.0, generator, ranks)
    assert sorted(indices.tolist()) == list(range(n - k, n))


@pytest.mark.parametrize("name", ["soft", "random"])
def test_the_uniform_policies_are(name: str) -> None:
    scores = np.array([0.5] * 12 + [9.0] * 4)
    counts = kept_counts(name, scores, 2000, ratio=0.25)
    if name == "soft":
        assert (counts[12:] == 2000).all()
        counts = counts[:12]
    assert_equally_often(counts, 2000, 0.75)


def test_orderdp_keeps_the_highest_of_its_pool() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 127, 5000):
        scores = np.round(rng.gamma(1.0, 1.0, n) * 8) / 8
        scores[rng.random(n) < 0.05] = np.nan
        some = set(np.flatnonzero(np.isfinite(scores)).tolist())
        for ratio in (0.1, 0.5, 0.9):
            k = max(1, round((1 - ratio) * len(some)))
            infobatch = make(n, "orderdp", ratio=ratio, seed=n)
            infobatch.scores.copy_(torch.from_numpy(scores.astype(np.float32)))
            plan = infobatch.sample(1)
            # The pool is what the policy draws from the epoch's generator first.
            choices = []

            def spy(view: View, into: list[Choice] = choices) -> Choice:
                into.append(policies.orderdp(view))
                return into[-1]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(infobatch, "_policy", Policy(spy))
                assert torch.equal(infobatch.sample(1).indices, plan.indices)
            priority = choices[0].priority
            assert priority is not None
            pool = {i for i in some if priority[i] > -math.inf}
            assert len(pool) == min(len(some), round(1.2 * k))
            assert all(priority[i] == scores[i] for i in pool)
            kept = set(plan.indices.tolist()) & some
            assert len(kept) == k
            assert kept <= pool
            best = sorted((scores[i] for i in pool), reverse=True)[:k]
            assert sorted((scores[i] for i in kept), reverse=True) == best


def test_orderdp_keeps_each_rank_as_often_as_a_uniform_pool_would() -> None:
    n, ratio, runs = 40, 0.5, 1500
    k, size = 20, 24
    order = np.random.default_rng(1).permutation(n)
    counts = kept_counts("orderdp", order, runs, ratio=ratio)
    for rank in range(n):  # 0 is the highest score
        # It is in the pool, and fewer than k of those above it are.
        share = size / n * stats.hypergeom.cdf(k - 1, n - 1, rank, size - 1)
        error = counts[order == n - 1 - rank].item() - runs * share
        assert abs(error) <= SIGMAS * math.sqrt(runs * share * (1 - share))


# repb


def test_repb_readmits_by_lot_and_weights_by_times_drawn() -> None:
    losses = losses_of(1000, 12, "gamma")
    plans = run(make(1000, "repb", epochs=12, ratio=0.8), losses, range(12))
    kept = np.zeros((12, 1000), bool)
    for epoch, plan in enumerate(plans):
        kept[epoch, plan.indices.numpy()] = True
    back = kept[2:][~kept[1:-1]].mean()
    assert 0.15 < back < 0.25  # 1 - r of those that sat out
    by_hand = [len(plans) / kept[:, i].sum() for i in range(1000) if kept[-1, i]]
    last = dict(zip(plans[-1].indices.tolist(), plans[-1].weights.tolist(), strict=True))
    assert [last[i] for i in range(1000) if kept[-1, i]] == pytest.approx(by_hand, rel=1e-6)


def test_repb_means_are_of_windows_in_the_order_trained() -> None:
    # In order of number the windows' means are 0.5, 1000.5 and 2000: of 0s and 1s, and so on.
    scores = np.concatenate([np.arange(400) % 2 + np.arange(400) // 200 * 1000, np.full(10, 2000)])
    drawn = policies.repb(view_of(scores, order=torch.arange(410))).prunable.tolist()
    assert drawn == [i < 400 and i % 2 == 0 for i in range(410)]
    # Alternating, of each window half are of the low 200 or all high.
    mixed = torch.tensor([*np.arange(400).reshape(2, 200).T.reshape(-1), *range(400, 410)])
    assert policies.repb(view_of(scores, order=mixed)).prunable.tolist() == [
        i < 200 for i in range(410)
    ]
    some = policies.repb(view_of(scores, order=torch.arange(0, 400, 3))).prunable
    assert some[torch.arange(410) % 3 != 0].all()  # those that sat out
    assert not some[:400:3].all()
    assert not policies.repb(view_of(scores)).prunable.any()


def test_repb_without_rescaling_has_weights_of_one() -> None:
    losses = losses_of(300, 5, "gamma")
    for plan in run(make(300, "repb", epochs=5, rescale=False), losses, range(5)):
        assert (plan.weights == 1).all()


# ucb


def test_ucb_by_hand() -> None:
    scores = torch.tensor([5.0, 5.0, 5.0, torch.nan])
    first = policies.ucb(View(scores, 1, 9, Budget(0.5), 0, history_of(torch.arange(4), 4)))
    assert first.prunable.tolist() == [True, True, True, False]
    assert first.memory["mean"].tolist() == [4, 4, 4, 0]
    assert first.memory["variance"].tolist() == [20, 20, 20, 0]
    # Samples 0, 2 and 3 are trained on, 2 with a loss that is not finite.
    scores = torch.tensor([9.0, 5.0, torch.nan, 10.0])
    history = history_of(torch.tensor([3, 0, 2]), 4)
    again = policies.ucb(View(scores, 2, 9, Budget(0.5), 0, history, memory=first.memory))
    assert again.prunable.tolist() == [True, True, False, True]
    assert again.memory["mean"].tolist() == [8, 4, 4, 8]
    assert again.memory["variance"].tolist() == [24, 20, 20, 80]
    assert again.priority is not None
    expected = [8 + math.sqrt(24), 4 + math.sqrt(20), 8 + math.sqrt(80)]
    assert again.priority[again.prunable].tolist() == pytest.approx(expected)
    assert first.memory["mean"].tolist() == [4, 4, 4, 0]  # not written to


# seta


def seta_groups(scores: list[float]) -> dict[int, int]:
    """Groups by the histogram of the scores seen: where the middle of a bin's share lies."""
    some = {i: np.float32(s) for i, s in enumerate(scores) if math.isfinite(s)}
    low, high = min(some.values()), max(some.values())
    bins = {
        i: min(1023, int((s - low) / (high - low) * np.float32(1024))) if high > low else 0
        for i, s in some.items()
    }
    counts = [0] * 1024
    for place in bins.values():
        counts[place] += 1
    shares = [count ** (1 / 3) for count in counts]
    total, before, group_of = sum(shares), 0.0, []
    for share in shares:
        group_of.append(min(4, int(5 * (before + share / 2) / total)))
        before += share
    return {i: group_of[place] for i, place in bins.items()}


def test_seta_groups_and_its_window(monkeypatch) -> None:
    rng = np.random.default_rng(2)
    scores = rng.gamma(1.0, 1.0, 5000).astype(np.float32)
    scores[rng.random(5000) < 0.05] = np.nan
    groups = seta_groups(scores.tolist())
    assert set(groups.values()) == set(range(5))
    values = [(scores[i].item(), group) for i, group in groups.items()]
    assert [group for _, group in sorted(values)] == sorted(groups.values())
    # Each has nearly the same share of the cube root of the density, in a histogram of our own.
    edges = np.linspace(np.nanmin(scores), np.nanmax(scores), 1025)
    share = np.zeros(5)
    for group in range(5):
        members = [scores[i] for i in groups if groups[i] == group]
        share[group] = np.cbrt(np.histogram(members, edges)[0]).sum()
    assert np.abs(share / share.sum() - 0.2).max() < 0.005
    for epoch in (1, 2, 3, 4):
        first = epoch % 2  # four groups of five: they are 1 to 4, then 0 to 3
        choice = policies.seta(view_of(scores, epoch=epoch))
        assert choice.priority is not None
        inside = {i for i in groups if first <= groups[i] < first + 4}
        best = choice.priority[choice.prunable].max()
        assert {i for i in groups if choice.priority[i] == best} == inside
    monkeypatch.setattr(policies, "SPAN", 1)  # so that all groups show
    for epoch in range(1, 8):
        choice = policies.seta(view_of(scores, epoch=epoch))
        assert choice.prunable.tolist() == [i in groups for i in range(5000)]
        assert choice.priority is not None
        center = epoch % 5
        for i, group in groups.items():
            assert choice.priority[i] == -abs(group - center)


def test_seta_draws_from_its_window_and_fills_up_from_the_nearest() -> None:
    scores = np.random.default_rng(5).permutation(np.arange(200.0))  # groups of about 40
    groups = seta_groups(scores.tolist())
    members = [sum(group == g for group in groups.values()) for g in range(5)]
    assert max(members) - min(members) <= 3
    counts = kept_counts("seta", scores, 1000, ratio=0.5)
    window = np.array([groups[i] > 0 for i in range(200)])
    assert counts.sum() == 1000 * 100
    assert (counts[~window] == 0).all()
    assert_equally_often(counts[window], 1000, 100 / window.sum())
    # Keeping 190, the window is kept whole, and of the first group all but ten.
    counts = kept_counts("seta", scores, 1000, ratio=0.05)
    assert (counts[window] == 1000).all()
    assert_equally_often(counts[~window], 1000, 1 - 10 / (~window).sum())


def test_seta_draws_from_all_in_the_tail() -> None:
    scores = np.arange(40.0)
    assert policies.seta(view_of(scores, epoch=4, tail=4)).priority is None
    assert policies.seta(view_of(scores, epoch=3, tail=4)).priority is not None
    counts = np.zeros(40)
    for seed in range(2000):
        infobatch = make(40, "seta", epochs=8, delta=0.5, anneal=False, seed=seed)
        infobatch.scores.copy_(torch.from_numpy(scores))
        plan = infobatch.sample(4)
        assert len(plan) == 20
        counts[plan.indices.numpy()] += 1
    assert_equally_often(counts, 2000, 0.5)


@pytest.mark.parametrize("scores", [[3.0, 3.0], [-3e38, 3e38, 0.0], [1.0], [0.0, math.nan, 5e-324]])
def test_extreme_scores_keep_the_budget(scores: list[float]) -> None:
    array = np.array(scores, np.float32)
    n = int(np.isfinite(array).sum())
    for name in ("hard", "orderdp", "seta"):
        infobatch = make(len(array), name)
        infobatch.scores.copy_(torch.from_numpy(array))
        assert len(infobatch.sample(1)) == len(array) - n + max(1, round(n / 2))


# What is said of them all


def mean_of_sums(name: str, scores: np.ndarray, values: np.ndarray, runs: int) -> tuple:
    """Mean and standard error of sum(weights * values) / N over seeds, in the second epoch."""
    sums = []
    for seed in range(runs):
        infobatch = make(len(scores), name, seed=seed)
        plan = infobatch.sample(0)
        train_on(infobatch, plan, scores)
        plan = infobatch.sample(1)
        weighted = plan.weights.double() @ torch.from_numpy(values)[plan.indices]
        sums.append(weighted.item() / len(scores))
    return np.mean(sums), np.std(sums) / math.sqrt(runs)


@pytest.mark.parametrize("name", POLICIES)
def test_unbiased_policies_are_and_others_not(name: str) -> None:
    scores = np.random.default_rng(1).gamma(1.0, 1.0, 500).astype(np.float32)
    values = scores.astype(np.float64) + 1  # the mean loss, say
    mean, error = mean_of_sums(name, scores, values, 1 if name == "none" else 300)
    bias = abs(mean - values.mean())
    if POLICIES[name].unbiased:
        assert bias <= SIGMAS * error + 1e-9
    else:
        assert bias > 10 * error


def test_which_have_weights() -> None:
    losses = losses_of(500, EPOCHS, "gamma")
    for name in POLICIES:
        plans = run(make(500, name), losses, range(EPOCHS))
        assert any((plan.weights != 1).any() for plan in plans) == (name not in UNWEIGHTED)
        plans = run(make(500, name, rescale=False), losses, range(EPOCHS))
        assert all((plan.weights == 1).all() for plan in plans)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_write_to_nothing_and_wait_for_nothing(name: str, way: str, monkeypatch) -> None:
    policy = POLICIES[name]
    calls = []

    def watched(view: View) -> Choice:
        before = copy.deepcopy((view.scores, dict(view.memory), view.history))
        with host_syncs(CPU, "forbid"):
            choice = policy.choose(view)
        calls.append((view, before, choice))
        return choice

    monkeypatch.setitem(POLICIES, name, replace(policy, choose=watched))
    infobatch = make(127, name)
    losses = losses_of(127, EPOCHS, "gamma")
    for epoch in range(EPOCHS):
        before = infobatch.scores.clone()
        with host_syncs(CPU, "count") as reads:
            plan = infobatch.sample(epoch)
        if way == "torch":  # the twin of the partition reads once more
            assert reads.count == (name != "none")
        torch.testing.assert_close(infobatch.scores, before, rtol=0, atol=0, equal_nan=True)
        train_on(infobatch, plan, losses[epoch])
    assert len(calls) == (0 if name == "none" else EPOCHS)
    for epoch, (view, (_, memory, history), choice) in enumerate(calls):
        assert view.epoch == epoch
        assert set(choice.memory) == set(policy.memory)
        assert set(memory) == (set(policy.memory) if epoch else set())
        assert (history is None) == (not policy.history or epoch == 0)
        torch.testing.assert_close(view.memory, memory, rtol=0, atol=0, equal_nan=True)
        if history is not None:
            torch.testing.assert_close(vars(view.history), vars(history), rtol=0, atol=0)


def same(one: Plan, other: Plan) -> bool:
    return torch.equal(one.indices, other.indices) and torch.equal(one.weights, other.weights)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_is_a_function_of_seed_and_epoch(name: str) -> None:
    losses = losses_of(300, EPOCHS, "gamma")
    mine = run(make(300, name, seed=5), losses, range(EPOCHS))
    twice = make(300, name, seed=5)
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        first, second = twice.sample(epoch), twice.sample(epoch)
        assert same(first, second)
        assert same(first, mine[epoch])
        train_on(twice, second, losses[epoch])
    other = run(make(300, name, seed=6), losses, range(EPOCHS))
    assert not any(same(one, another) for one, another in zip(mine, other, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", POLICIES)
def test_whole_batches(name: str) -> None:
    losses = losses_of(1003, EPOCHS, "gamma")
    infobatch = make(1003, name, ratio=0.4)
    for epoch in range(EPOCHS):
        plan = infobatch.sample(epoch, 64)
        if epoch and name != "none":
            assert len(plan) % 64 == 0
            exact = 1003 - 0.4 * plan.num_prunable
            assert abs(len(plan) - exact) <= 32
            if POLICIES[name].unbiased:
                assert plan.weights.double().sum().item() == pytest.approx(1003, rel=1e-6)
        else:
            assert len(plan) == 1003
        assert len(set(plan.indices.tolist())) == len(plan)
        train_on(infobatch, plan, losses[epoch])


# Scores


def test_bls_by_hand() -> None:
    infobatch = make(5, "none", score="bls")
    batch = Batch(torch.tensor([3, 0, 1]), torch.ones(3))
    loss = infobatch.update(torch.tensor([1.0, 2.0, 6.0]), batch)
    assert loss.item() == 3  # the losses themselves are trained on
    assert infobatch.scores.tolist()[:2] == [3, 3]
    assert infobatch.scores[3] == 3
    assert infobatch.scores[[2, 4]].isnan().all()
    infobatch.update(torch.tensor([1.0, 3.0]), Batch(torch.tensor([3, 4]), torch.ones(2)))
    assert infobatch.scores[3] == pytest.approx(3 + 0.1 * (2 - 3))
    assert infobatch.scores[4] == 2
    # A loss that is not finite is not in the mean, and its sample is kept.
    batch = Batch(torch.tensor([0, 1, 2, 3]), torch.tensor([9.0, 1, 1, 1]))
    infobatch.update(torch.tensor([math.nan, 5.0, math.inf, 1.0]), batch)
    assert infobatch.scores[[0, 2]].isnan().all()
    assert infobatch.scores[[1, 3, 4]].tolist() == pytest.approx([3, 2.91, 2])
    infobatch.update(torch.tensor([math.nan]), Batch(torch.tensor([4]), torch.ones(1)))
    assert infobatch.scores[4].isnan()
    # It begins anew.
    infobatch.update(torch.tensor([7.0]), Batch(torch.tensor([4]), torch.ones(1)))
    assert infobatch.scores[4] == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bls_of_every_dtype_and_shape(dtype: torch.dtype) -> None:
    infobatch = make(4, "none", score="bls")
    batch = Batch(torch.tensor([2, 0]), torch.tensor([2.0, 1.0]))
    losses = torch.tensor([[1.0, 3.0], [2.0, 8.0]], dtype=dtype, requires_grad=True)
    loss = infobatch.update(losses, batch)
    loss.backward()
    assert loss.item() == (2 * 2 + 5) / 2
    assert losses.grad is not None
    assert losses.grad.tolist() == [[0.5, 0.5], [0.25, 0.25]]
    assert infobatch.scores[[2, 0]].tolist() == [3.5, 3.5]
    assert not infobatch.scores.requires_grad
    assert infobatch.scores.dtype == torch.float32


def test_bls_of_a_skipped_step_keeps_the_scores() -> None:
    infobatch = make(3, "none", score="bls")
    infobatch.scores.copy_(torch.tensor([1.0, 2.0, 3.0]))
    batch = Batch(torch.tensor([2, 1]), torch.ones(2))
    infobatch.record(torch.tensor([9.0, 8.0]), batch, torch.ones(()))
    assert infobatch.scores.tolist() == [1, 2, 3]
    infobatch.record(torch.tensor([9.0, 8.0]), batch, torch.zeros(1))
    assert infobatch.scores.tolist() == pytest.approx([1, 2.65, 3.55])
    with host_syncs(CPU, "forbid"):
        infobatch.update(torch.tensor([9.0, 8.0]), batch)


# A policy of one's own: one function and one line


def history_kept(view: View) -> Choice:
    """Gives what it was shown as memory, for the test to look at."""
    nothing, history = torch.zeros(()), view.history
    times, latest = (nothing, nothing) if history is None else (history.times, history.latest)
    return Choice(view.seen, memory={"times": times, "latest": latest})


def test_history_counts_full_epochs_too(monkeypatch) -> None:
    monkeypatch.setitem(
        POLICIES, "mine", Policy(history_kept, memory=("times", "latest"), history=True)
    )
    # The first is full, those in the middle prune, the last two are full.
    infobatch = make(100, "mine", epochs=8, delta=0.75)
    losses = losses_of(100, 8, "gamma")
    times, latest = torch.zeros(100), torch.full((100,), -1)
    for epoch in range(8):
        plan = infobatch.sample(epoch)
        assert (len(plan) == 100) == (epoch in (0, 6, 7))
        if epoch:
            memory = infobatch.state_dict()["after"]["memory"]
            assert memory["times"].tolist() == times.tolist()
            assert memory["latest"].tolist() == latest.tolist()
        times[plan.indices] += 1
        latest[plan.indices] = epoch
        train_on(infobatch, plan, losses[epoch])


def test_ucb_learns_from_a_full_epoch() -> None:
    infobatch = make(50, "ucb", epochs=8, delta=0.5)
    losses = losses_of(50, 8, "grid")
    for epoch in range(5):
        train_on(infobatch, infobatch.sample(epoch), losses[epoch])
    before = infobatch.state_dict()["after"]["memory"]["mean"]
    infobatch.sample(5)  # the sixth is full, as the fifth was
    after = infobatch.state_dict()["after"]["memory"]["mean"]
    seen = infobatch.scores.isfinite()
    torch.testing.assert_close(after[seen], (0.2 * before + 0.8 * infobatch.scores)[seen])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"memory": {"b": torch.ones(9)}}, "memory of policy mine .* a, got b"),
        ({"memory": {}}, "memory of policy mine .* a, got none"),
        ({"memory": {"a": 3}}, "memory a of policy mine must be a tensor, got int"),
        ({"priority": torch.full((9,), torch.nan)}, "priority of policy mine .* NaN"),
        ({"priority": torch.ones(8)}, "priority of policy mine must be .*9"),
        ({"priority": [1.0] * 9}, "priority of policy mine must be .*, got list"),
        ({"weights": torch.tensor([math.inf] + 8 * [1.0])}, "weights of policy mine .* finite"),
    ],
)
def test_what_a_policy_may_not_give(monkeypatch, choice: dict, words: str) -> None:
    fit = {"memory": {"a": torch.ones(())}, **choice}
    entry = Policy(lambda view: Choice(view.seen, **fit), memory=("a",))
    monkeypatch.setitem(POLICIES, "mine", entry)
    infobatch = make(9, "mine")
    infobatch.scores.fill_(1.0)
    with pytest.raises((TypeError, ValueError), match=words):
        infobatch.sample(1)


def test_labels_reach_a_policy(monkeypatch) -> None:
    labels = torch.arange(12) % 3
    monkeypatch.setitem(POLICIES, "third", Policy(lambda view: Choice(view.labels == 2)))
    plan = make(12, "third", labels=labels).sample(1)
    assert plan.num_prunable == 4
    with pytest.raises(ValueError, match=r"labels must be torch.int64 of shape \(12,\)"):
        make(12, "soft", labels=labels[:3])


def easiest_first(view: View) -> Choice:
    return Choice(view.seen, priority=-view.scores)


def test_a_policy_is_one_function_and_one_line(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(POLICIES, "easiest", Policy(easiest_first))
    (tmp_path / "mine.py").write_text(
        "from infobatch_fast.policies import Choice\n"
        "easiest = lambda view: Choice(view.seen, priority=-view.scores)\n"
    )
    monkeypatch.chdir(tmp_path)
    losses = np.tile(np.arange(100, dtype=np.float32), (3, 1))
    for name in ("easiest", "mine:easiest"):
        plans = run(make(100, name, ratio=0.25), losses, range(3))
        assert sorted(plans[1].indices.tolist()) == list(range(75))
