"""`InfoBatch` against a brute-force reference in numpy, its statistics, and its errors."""

import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from infobatch_fast import Batch, InfoBatch
from infobatch_fast.kernels import reference
from infobatch_fast.plan import Plan, per_sample
from infobatch_fast.policies import POLICIES, Choice, Policy
from infobatch_fast.telemetry.syncs import host_syncs


def make(n: int, epochs: int = 8, **kwargs) -> InfoBatch:
    return InfoBatch(n, epochs, **{"device": "cpu", "delta": 1.0, **kwargs})


def with_scores(scores: np.ndarray, **kwargs) -> InfoBatch:
    infobatch = make(len(scores), **kwargs)
    infobatch.scores.copy_(torch.from_numpy(scores.astype(np.float32)))
    return infobatch


def brute_well_learned(scores: np.ndarray) -> np.ndarray:
    finite = [float(s) for s in scores if np.isfinite(s)]
    mean = sum(Fraction(s) for s in finite) / len(finite) if finite else Fraction(0)
    return np.array([bool(np.isfinite(s)) and Fraction(float(s)) < mean for s in scores])


def check_plan(infobatch: InfoBatch, scores: np.ndarray, epoch: int = 1) -> None:
    plan = infobatch.sample(epoch)
    well = brute_well_learned(scores)
    n = int(well.sum())
    k = max(1, round((1 - infobatch.pruning.ratio) * n)) if n else 0
    indices, weights = plan.indices.numpy(), plan.weights.numpy()
    assert plan.num_prunable == n
    assert len(plan) == len(indices) == len(scores) - n + k
    assert len(set(indices.tolist())) == len(indices)
    assert set(np.flatnonzero(~well)) <= set(indices.tolist())
    kept_well = well[indices]
    assert kept_well.sum() == k
    expected = np.where(kept_well, np.float32(n / k if k else 1), np.float32(1))
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("n", [1, 2, 3, 127, 1000, 50_000])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.7, 0.999])
def test_sample_against_brute_force(n: int, ratio: float) -> None:
    rng = np.random.default_rng(n)
    scores = rng.gamma(1.0, 1.0, n).astype(np.float32)
    scores[rng.random(n) < 0.1] = np.nan
    infobatch = with_scores(scores, ratio=ratio)
    if ratio == 0:
        plan = infobatch.sample(1)
        assert sorted(plan.indices.tolist()) == list(range(n))
        assert (plan.weights == 1).all()
    else:
        check_plan(infobatch, scores)


# Of sums that float64 holds exactly, so that the reference's mean is the one compared with.
SCORES = st.integers(-(2**20), 2**20).map(lambda i: i / 1024)
SPECIAL = st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])


@settings(deadline=None, max_examples=200)
@given(st.lists(SCORES | SPECIAL, min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_sample_with_any_scores(scores: list[float], ratio: float) -> None:
    array = np.array(scores, np.float32)
    check_plan(with_scores(array, ratio=ratio), array)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_extreme_scores_keep_the_invariants(scores: list[float]) -> None:
    array = np.array(scores, np.float32)
    plan = with_scores(array).sample(1)
    indices = plan.indices.tolist()
    assert len(set(indices)) == len(indices)
    assert set(np.flatnonzero(~np.isfinite(array))) <= set(indices)
    assert plan.weights.double().sum().item() == pytest.approx(len(array), rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 3.0, 1e-30, 1e30, -2.5])
def test_equal_scores_prune_nothing(value: float) -> None:
    plan = with_scores(np.full(50_000, value, np.float32)).sample(1)
    assert len(plan) == 50_000
    assert plan.num_prunable == 0


def test_threshold_is_the_float64_mean_rounded_up() -> None:
    # The means lie between two float32 neighbours, nearer to the one or the other.
    low = np.float32(1.0)
    high = np.nextafter(low, np.float32(2))
    for scores in ([low, high, high], [high, low, low]):
        tensor = torch.tensor(np.array(scores))
        assert reference.threshold(tensor).item() == high
        assert reference.well_learned(tensor).tolist() == [score == low for score in scores]
    assert torch.isnan(reference.threshold(torch.full((3,), torch.nan)))


def test_mean_is_accumulated_in_float64() -> None:
    scores = np.full(2_000_000, 0.1, np.float32)
    scores[0] = 0.2
    check = torch.from_numpy(scores)
    exact = float(np.sum(scores, dtype=np.float64) / scores.size)
    assert abs(reference.threshold(check).item() - exact) <= np.spacing(np.float32(exact))
    assert reference.well_learned(check).sum() == 1_999_999


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200, 100_000])
@pytest.mark.parametrize("n", [5, 128, 1003])
def test_whole_batches_take_the_nearest_count(n: int, batch_size: int) -> None:
    scores = np.random.default_rng(3).gamma(1.0, 1.0, n).astype(np.float32)
    for ratio in (0.3, 0.5, 0.9):
        plan = with_scores(scores, ratio=ratio).sample(1, batch_size)
        well = brute_well_learned(scores)
        prunable = int(well.sum())
        target = (1 - ratio) * prunable
        whole = [k for k in range(1, prunable + 1) if (n - prunable + k) % batch_size == 0]
        k = len(plan) - (n - prunable)
        if whole:
            assert len(plan) % batch_size == 0
            assert abs(k - target) == min(abs(other - target) for other in whole)
        else:
            assert k == max(1, round(target))
        kept = plan.weights[torch.from_numpy(well)[plan.indices]]
        assert kept.numel() == k
        assert set(kept.tolist()) == {float(np.float32(prunable / k))}
        assert plan.weights.double().sum().item() == pytest.approx(n, rel=1e-6)


@pytest.mark.parametrize(("epochs", "delta"), [(90, 0.875), (7, 0.3), (200, 0.07), (5, 0.0)])
def test_annealing_epochs_are_full_with_weight_one(epochs: int, delta: float) -> None:
    scores = np.random.default_rng(0).random(100).astype(np.float32)
    infobatch = with_scores(scores, epochs=epochs, delta=delta)
    for epoch in range(epochs):
        plan = infobatch.sample(epoch)
        assert plan.epoch == epoch
        if epoch >= infobatch.first_full_epoch:
            assert sorted(plan.indices.tolist()) == list(range(100))
            assert (plan.weights == 1).all()
        else:
            assert len(plan) < 100
            assert (plan.weights > 1).any()


@pytest.mark.parametrize(("n", "ratio"), [(12, 0.5), (300, 0.5), (300, 0.1), (300, 0.95)])
def test_choice_is_uniform_without_replacement(n: int, ratio: float) -> None:
    # How often each is kept, and each pair together, over many seeds: all about equally.
    scores, k = np.array([0.0] * n + [10.0] * 4, np.float32), round((1 - ratio) * n)
    runs, pairs = 2000, np.zeros((n, n))
    for seed in range(runs):
        plan = with_scores(scores, ratio=ratio, seed=seed).sample(1)
        kept = np.zeros(n)
        kept[plan.indices[plan.indices < n]] = 1
        assert kept.sum() == k
        pairs += np.outer(kept, kept)
    own = np.eye(n, dtype=bool)
    for counts, share in ((pairs[own], k / n), (pairs[~own], k * (k - 1) / (n * (n - 1)))):
        rare, often = 1e-3 / counts.size, stats.binom(runs, share)
        assert often.ppf(rare) <= counts.min() <= counts.max() <= often.isf(rare)
        assert n < 100 or counts.std() == pytest.approx(often.std(), rel=0.2)


def test_order_is_uniform_and_independent_of_the_choice() -> None:
    scores = np.array([0.0] * 8000 + [10.0] * 2000, np.float32)
    plan = with_scores(scores).sample(1)
    prunable = (plan.indices < 8000).numpy()
    half = len(plan) // 2
    table = [[prunable[:half].sum(), (~prunable[:half]).sum()]]
    table.append([prunable[half:].sum(), (~prunable[half:]).sum()])
    association: Any = stats.chi2_contingency(table)
    assert association.pvalue > 1e-4
    position = np.arange(len(plan))
    correlation: Any = stats.spearmanr(position, plan.indices.numpy())
    assert abs(correlation.statistic) < 4 / np.sqrt(len(plan))
    # Every order is equally likely: of four samples, and of three where one of 0 and 1 is pruned.
    for scores, orders in (([1, 1, 1, 1], 24), ([0, 0, 9, 9], 6)):
        seen: dict[tuple[int, ...], int] = {}
        for seed in range(2400):
            drawn = with_scores(np.array(scores), seed=seed).sample(1).indices.tolist()
            key = tuple(drawn) if orders == 24 else tuple(max(i, 1) for i in drawn)
            seen[key] = seen.get(key, 0) + 1
        assert len(seen) == orders
        assert stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_weighted_sum_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    scores = rng.gamma(1.0, 1.0, 500).astype(np.float32)
    values = rng.normal(size=500) + 2
    for kwargs in ({"ratio": 0.5}, {"ratio": 0.7}, {"ratio": 0.3, "policy": "random"}):
        sums = []
        for seed in range(800):
            plan = with_scores(scores, seed=seed, **kwargs).sample(1)
            sums.append(float(plan.weights.double() @ torch.from_numpy(values)[plan.indices]))
        error = np.mean(sums) - values.sum()
        assert abs(error) < 4 * np.std(sums) / np.sqrt(len(sums))
        assert np.std(sums) > 0


def test_epochs_and_seeds_draw_independently() -> None:
    scores = np.array([0.0] * 2000 + [10.0] * 100, np.float32)

    def kept(seed: int, epoch: int) -> np.ndarray:
        plan = with_scores(scores, seed=seed).sample(epoch)
        mask = np.zeros(2000, bool)
        mask[[i for i in plan.indices.tolist() if i < 2000]] = True
        return mask

    first = kept(0, 1)
    assert (first == kept(0, 1)).all()
    for other in (kept(0, 2), kept(1, 1), kept(1, 0), kept(2**62, 1)):
        agree = (first == other).mean()
        assert abs(agree - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_global_generators_are_left_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    python_state = random.getstate()
    infobatch = with_scores(np.random.default_rng(0).random(100))
    infobatch.update(torch.rand(10, generator=torch.Generator()), infobatch.sample(1).batch(0, 10))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == str(np.random.get_state())
    assert python_state == random.getstate()
    torch.manual_seed(5)
    before = infobatch.sample(2).indices
    torch.manual_seed(6)
    assert torch.equal(before, infobatch.sample(2).indices)


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}


def test_losses_whose_squares_overflow_are_scores_as_others() -> None:
    infobatch = make(4)
    infobatch.update(torch.full((4,), 2e19), infobatch.sample(0).batch(0, 4))
    assert infobatch.scores.tolist() == [pytest.approx(2e19)] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_torchs_default_device_is_left_out_of_it(policy: str) -> None:
    infobatch, other = make(100, policy=policy), make(100, policy=policy)
    for epoch in range(3):
        want = other.sample(epoch)
        with torch.device("meta"):
            plan = infobatch.sample(epoch)
        assert torch.equal(plan.indices, want.indices)
        for batch in plan.batches(10):
            losses = torch.rand(len(batch.indices))
            other.update(losses, batch)
            with torch.device("meta"):
                infobatch.update(losses, batch)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ["B", "B1", "BT"])
def test_update_against_brute_force(dtype: torch.dtype, shape: str) -> None:
    rng = np.random.default_rng(7)
    infobatch = with_scores(rng.gamma(1.0, 1.0, 60), ratio=0.6)
    scores = infobatch.scores.numpy().copy()
    terms = {"B": 1, "B1": 1, "BT": 5}[shape]
    for batch in infobatch.sample(1).batches(16):
        b = batch.indices.numel()
        values = torch.from_numpy(rng.gamma(1.0, 1.0, (b, terms))).to(dtype)
        losses = (values[:, 0] if shape == "B" else values).clone().requires_grad_()
        loss = infobatch.update(losses, batch)
        loss.backward()
        mean = values.double().numpy().mean(1)
        weights = batch.weights.double().numpy()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(loss.item(), (weights * mean).mean(), rtol=max(tolerance, 1e-6))
        expected = np.repeat(weights[:, None] / b / terms, terms, axis=1)
        assert losses.grad is not None
        grad = losses.grad.double().numpy().reshape(b, terms)
        np.testing.assert_allclose(grad, expected, rtol=tolerance)
        scores[batch.indices.numpy()] = mean
    np.testing.assert_allclose(infobatch.scores.numpy(), scores, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_non_finite_losses_become_nan(dtype: torch.dtype) -> None:
    infobatch = make(5)
    batch = Batch(torch.arange(4), torch.ones(4))
    values = [1.0, float("nan"), float("inf"), -float("inf")]
    infobatch.update(torch.tensor(values, dtype=dtype), batch)
    assert infobatch.scores[0] == 1
    assert infobatch.scores.isnan().tolist() == [False, True, True, True, True]
    infobatch.update(torch.tensor([1e300] * 4, dtype=torch.float64), batch)
    assert infobatch.scores.isnan().all()


def test_found_inf_keeps_the_scores() -> None:
    infobatch = with_scores(np.arange(4.0))
    batch = Batch(torch.tensor([2, 1]), torch.ones(2))
    infobatch.record(torch.tensor([9.0, 8.0]), batch, torch.ones(()))
    assert infobatch.scores.tolist() == [0, 1, 2, 3]
    infobatch.record(torch.tensor([9.0, 8.0]), batch, torch.zeros(1))
    assert infobatch.scores.tolist() == [0, 8, 9, 3]


def test_one_host_read_a_pruned_epoch_and_none_elsewhere() -> None:
    infobatch = with_scores(np.random.default_rng(0).random(1000), delta=0.5)
    with host_syncs(torch.device("cpu"), "count") as reads:
        plan = infobatch.sample(1, 32)
    assert reads.count == 1
    with host_syncs(torch.device("cpu"), "count") as reads:
        infobatch.sample(7)
        for batch in plan.batches(64):
            infobatch.update(torch.ones(batch.indices.numel(), dtype=torch.float16), batch)
    assert reads.count == 0


def test_state_round_trip(tmp_path) -> None:
    ratio = np.linspace(0, 0.5, 3)[2]  # numpy's number is none of weights_only's
    infobatch = with_scores(np.random.default_rng(0).random(50), seed=4, ratio=ratio)
    infobatch.scores[3] = torch.nan
    torch.save(infobatch.state_dict(), tmp_path / "state")
    other = make(50, seed=4)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(infobatch.scores.view(torch.int32), other.scores.view(torch.int32))
    assert torch.equal(infobatch.sample(2).indices, other.sample(2).indices)
    state = infobatch.state_dict()
    infobatch.scores.fill_(1)
    assert state["scores"][0] != 1


def follow(infobatch: InfoBatch, losses: torch.Tensor, epochs: range) -> list[Plan]:
    plans = []
    for epoch in epochs:
        plans.append(infobatch.sample(epoch, 20))
        for batch in plans[-1].batches(20):
            infobatch.update(losses[epoch, batch.indices], batch)
    return plans


STATES = [
    *({"policy": policy} for policy in POLICIES),
    {"policy": "repb", "score": "bls"},
    {"policy": "ucb", "ratio_schedule": "pods", "score": "bls"},
    {"policy": "soft", "target_saving": 0.3},
    {"policy": "repb", "target_saving": 0.2, "ratio_schedule": "pods"},
]


@pytest.mark.parametrize("kwargs", STATES, ids=lambda kwargs: "-".join(map(str, kwargs.values())))
def test_a_run_goes_on_from_its_state(tmp_path, kwargs: dict) -> None:
    rng = np.random.default_rng(2)
    losses = torch.from_numpy(rng.gamma(1.0, 1.0, (9, 300)).astype(np.float32))
    losses[torch.from_numpy(rng.random((9, 300)) < 0.05)] = torch.nan
    undisturbed = make(300, 9, seed=3, **kwargs)
    expected = follow(undisturbed, losses, range(9))
    stopped = make(300, 9, seed=3, **kwargs)
    follow(stopped, losses, range(4))
    # In the middle of the fifth epoch, and between the seventh and the eighth.
    plan = stopped.sample(4, 20)
    assert torch.equal(plan.indices, expected[4].indices)
    drawn = make(300, 9, seed=3, **kwargs)
    drawn.load_state_dict(stopped.state_dict())
    assert torch.equal(drawn.sample(4, 20).indices, plan.indices)  # again, and counted once
    batches = list(plan.batches(20))
    for batch in batches[:5]:
        stopped.update(losses[4, batch.indices], batch)
    torch.save(stopped.state_dict(), tmp_path / "within")
    within = make(300, 9, seed=3, **kwargs)
    within.load_state_dict(torch.load(tmp_path / "within", weights_only=True))
    for batch in batches[5:]:
        within.update(losses[4, batch.indices], batch)
    plans = follow(within, losses, range(5, 7))
    torch.save(within.state_dict(), tmp_path / "between")
    between = make(300, 9, seed=3, **kwargs)
    follow(between, losses, range(2))  # of which nothing is left
    between.load_state_dict(torch.load(tmp_path / "between", weights_only=True))
    plans += follow(between, losses, range(7, 9))
    for mine, theirs in zip(plans, expected[5:], strict=True):
        assert torch.equal(mine.indices, theirs.indices)
        assert torch.equal(mine.weights, theirs.weights)
        assert (mine.ratio, mine.num_prunable) == (theirs.ratio, theirs.num_prunable)
    assert torch.equal(between.scores.nan_to_num(-1), undisturbed.scores.nan_to_num(-1))
    assert any(len(plan) < 300 for plan in expected) == (kwargs["policy"] != "none")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"version": 99}, "version of the state must be 4, got 99"),
        ({"ratio": 0.3}, "ratio of the state must be 0.5, got 0.3"),
        ({"num_samples": 6}, "num_samples of the state must be 5, got 6"),
        ({"policy": "hard"}, "policy of the state must be soft, got hard"),
        ({"seed": None}, "seed of the state must be 0, got None"),
        (None, r"state must be from state_dict\(\), got NoneType"),
    ],
)
def test_a_state_of_other_settings_changes_nothing(broken: dict | None, message: str) -> None:
    infobatch = with_scores(np.arange(5.0))
    state = {**make(5).state_dict(), **broken} if broken is not None else None
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        infobatch.load_state_dict(state)  # pyright: ignore[reportArgumentType]
    assert infobatch.scores.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", [{"plan": 3}, {"past": None}, {"scores": torch.ones(4)}])
def test_a_damaged_state_changes_nothing(damage: dict) -> None:
    infobatch = with_scores(np.arange(5.0))
    with pytest.raises(ValueError, match=r"^state must be from state_dict\(\): "):
        infobatch.load_state_dict({**make(5).state_dict(), **damage})
    assert infobatch.scores.tolist() == [0, 1, 2, 3, 4]
    batch = infobatch.sample(1).batch(0, 2)
    with pytest.raises(ValueError, match=r"^scores must hold one value per sample"):
        infobatch.update(torch.ones(2), batch, scores=torch.ones(3))
    assert infobatch.recorded == 0


def test_expected_saving_is_what_is_saved_but_for_rounding() -> None:
    scores = np.random.default_rng(0).gamma(1.0, 1.0, 1003)
    for policy in POLICIES:
        for ratio in (0.0, 0.1, 0.333, 0.9):
            plan = with_scores(scores, policy=policy, ratio=ratio).sample(1)
            assert plan.expected_saving == plan.ratio * plan.num_prunable / 1003
            assert abs(plan.expected_saving - (1 - len(plan) / 1003)) <= 0.5 / 1003 + 1e-12
            if plan.num_prunable:
                assert plan.ratio == pytest.approx(ratio, abs=1e-12)
            else:
                assert plan.ratio == 0
    brute = brute_well_learned(scores.astype(np.float32)).mean()
    plan = with_scores(scores, ratio=0.333).sample(1)
    assert plan.expected_saving == pytest.approx(0.333 * brute, abs=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, r"ratio must be in \[0, 1\), got -0.1"),
        ({"ratio": float("nan")}, r"ratio must be in \[0, 1\), got nan"),
        ({"ratio": "0.5"}, "ratio must be a number, got '0.5'"),
        ({"delta": None}, "delta must be a number, got None"),
        ({"delta": 1.1}, r"delta must be in \[0, 1\], got 1.1"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"num_samples": 1.5}, "num_samples must be a whole number of at least 1, got 1.5"),
        ({"num_samples": float("inf")}, "num_samples must be a whole number .*, got inf"),
        ({"num_epochs": True}, "num_epochs must be a whole number of at least 1, got True"),
        ({"target_saving": 1.0}, r"target_saving must be in \(0, 1\), got 1.0"),
        ({"score": "lsos"}, r"score must be one of loss, bls, got lsos \(did you mean loss\?\)"),
        ({"ratio_schedule": 3}, "ratio_schedule must be one of constant, pods, .*, got 3"),
        ({"policy": "sotf"}, r"policy must be one of soft, .* got sotf \(did you mean soft\?\)"),
        ({"device": "mps"}, "device must be cpu beside a network on mps, which has no float64"),
        ({"policy": "os:nothing"}, "policy os:nothing cannot be imported: .*"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        InfoBatch(**{"num_samples": 10, "num_epochs": 10, "device": "cpu", **kwargs})


def test_bad_calls() -> None:
    infobatch = make(10, epochs=8)
    with pytest.raises(ValueError, match=r"^epoch must be in \[0, 8\), got 8$"):
        infobatch.sample(8)
    with pytest.raises(
        ValueError, match=r"^batch_size must be a whole number of at least 1, got 0$"
    ):
        infobatch.sample(0, 0)
    batch = infobatch.sample(0).batch(0, 4)
    with pytest.raises(ValueError, match=r'reduction="none"\), got shape \(\)'):
        infobatch.update(torch.tensor(1.0), batch)
    with pytest.raises(ValueError, match=r"one value per sample of the batch of 4 .* \(3,\)"):
        infobatch.update(torch.ones(3), batch)
    with pytest.raises(TypeError, match=r"^losses must be a floating tensor, got torch.int64$"):
        infobatch.update(torch.ones(4, dtype=torch.int64), batch)
    with pytest.raises(TypeError, match=r"^losses must be a floating tensor, got list$"):
        infobatch.update([1.0] * 4, batch)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"got shape \(4, 0\)$"):
        infobatch.update(torch.ones(4, 0), batch)
    with pytest.raises(ValueError, match=r"^batch_size must be a whole number .* got -1$"):
        list(infobatch.sample(0).batches(-1))
    with pytest.raises(TypeError):
        infobatch.sample(1.5)  # pyright: ignore[reportArgumentType]
    assert infobatch.scores.isnan().all()


def test_a_batch_of_one_may_be_squeezed() -> None:
    infobatch = make(10)
    infobatch.update(torch.tensor(2.0), infobatch.sample(0).batch(0, 1))
    assert infobatch.scores.isfinite().sum() == 1
    assert per_sample(torch.tensor(2.0), 1).shape == (1,)


@pytest.mark.gpu
def test_no_sync_in_update_and_one_an_epoch_on_cuda() -> None:
    infobatch = InfoBatch(50_000, 8, delta=0.5)
    infobatch.scores.uniform_()
    plan = infobatch.sample(1)
    losses = torch.rand(200, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    generator = torch.Generator("cuda")
    with host_syncs(torch.device("cuda"), "forbid"):
        infobatch.update(losses, plan.batch(0, 200)).backward()
        infobatch.sample(7)
        prunable = reference.well_learned(infobatch.scores)
    n = int(prunable.sum())
    with host_syncs(
        torch.device("cuda"), "forbid"
    ):  # so that the one sync of an epoch is the count
        reference.choose(prunable, n, n // 2, 2.0, generator)
        with pytest.raises(RuntimeError, match="synchroniz"):
            infobatch.sample(2)


@pytest.mark.gpu
def test_scores_and_losses_on_different_devices() -> None:
    for scores_on, losses_on in (("cpu", "cuda"), ("cuda", "cpu")):
        infobatch = InfoBatch(100_000, 4, device=scores_on)
        plan = infobatch.sample(0)
        for batch in plan.batches(20_000):
            losses = torch.rand(batch.indices.numel(), device=losses_on)
            if losses_on == "cuda":
                torch.cuda._sleep(20_000_000)  # the copy is still under way when it is read
                losses = losses * 2 + 1
            loss = infobatch.update(losses, batch)
            torch.testing.assert_close(loss.cpu(), losses.mean().cpu())
            assert torch.equal(infobatch.scores[batch.indices].cpu(), losses.cpu())


@pytest.mark.gpu
def test_cuda_agrees_with_brute_force() -> None:
    scores = np.random.default_rng(0).gamma(1.0, 1.0, 50_000).astype(np.float32)
    infobatch = InfoBatch(len(scores), 8, device="cuda")
    infobatch.scores.copy_(torch.from_numpy(scores))
    plan = infobatch.sample(1)
    well = brute_well_learned(scores)
    n = int(well.sum())
    indices = plan.indices.cpu().numpy()
    assert len(set(indices.tolist())) == len(indices) == 50_000 - n + round(0.5 * n)
    assert set(np.flatnonzero(~well)) <= set(indices.tolist())
    kept = well[indices]
    weights = np.where(kept, np.float32(n / kept.sum()), np.float32(1))
    np.testing.assert_array_equal(plan.weights.cpu().numpy(), weights)


def test_what_is_no_policy_no_choice_and_no_batch_is_told(monkeypatch) -> None:
    every = lambda view: Choice(view.seen)  # noqa: E731
    monkeypatch.setitem(POLICIES, "mine", every)
    with pytest.raises(TypeError, match=r"^POLICIES\['mine'\] must be a Policy, got function$"):
        make(5, policy="mine")
    for choose, message in (
        (lambda view: view.seen, "policy mine must give a Choice, got Tensor"),
        (
            lambda view: Choice(view.scores),
            r"prunable of policy mine must be torch.bool of shape \(5,\), "
            r"got torch.float32 of shape \(5,\)",
        ),
        (
            lambda view: Choice(view.seen, priority=view.scores[:3]),
            r"priority of policy mine must be .* got torch.float32 of shape \(3,\)",
        ),
        (lambda view: Choice(view.seen, weights=view.scores.double()), "weights of policy mine .*"),
    ):
        monkeypatch.setitem(POLICIES, "mine", Policy(choose))
        infobatch = make(5, policy="mine")
        infobatch.scores.fill_(1)
        with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
            infobatch.sample(1)
    pixels, labels = torch.ones(5, 3), torch.arange(5)
    for batch in (labels, (pixels, labels), (labels, pixels), None):
        with pytest.raises(TypeError, match=r"^batch must be the Batch that came with the samples"):
            make(5).update(torch.ones(5), batch)  # type: ignore[arg-type]
    batch = make(5).sample(0).batch(0, 5)
    for rebuilt in (Batch([*batch]), [*batch], tuple(batch)):  # as frameworks hand it back
        infobatch = make(5)
        infobatch.update(torch.arange(5.0), rebuilt)  # type: ignore[arg-type]
        assert infobatch.scores[batch.indices].tolist() == [0, 1, 2, 3, 4]
    assert repr(make(5).sample(0).batch(0, 3)) == "Batch(of 3 samples, on cpu)"


def test_masked_losses_count_real_tokens_alone() -> None:
    infobatch = with_scores(np.zeros(4))
    losses = torch.tensor([[1.0, 3.0, torch.nan], [5.0, torch.inf, 9.0], [7.0, 7.0, 7.0]])
    losses.requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    batch = Batch(torch.tensor([2, 0, 1]), torch.tensor([2.0, 1.0, 1.0]))
    loss = infobatch.update(losses, batch, mask=mask)
    loss.backward()
    assert loss.item() == (2 * 2 + 5 + 0) / 3
    assert infobatch.scores.tolist() == [5, 0, 2, 0]
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0]]) / 3)
    with pytest.raises(ValueError, match=r"^mask must have the shape of the losses, \(3, 3\)"):
        infobatch.update(losses, batch, mask=mask[:, :2])


compiled_with = make(60)  # a global one: torch.compile takes its numbers for constants


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks, and hides it elsewhere
def test_a_compiled_step_updates_and_is_compiled_once() -> None:
    infobatch, eager = compiled_with, make(60)
    values = torch.rand(60, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def step(batch: Batch, indices: torch.Tensor) -> torch.Tensor:
        return 3 * compiled_with.update((2 * values[indices]).square(), batch)

    compiled = torch.compile(step, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(3):
            for of, other in zip(
                infobatch.sample(epoch, 10).batches(10),
                eager.sample(epoch, 10).batches(10),
                strict=True,
            ):
                loss = compiled(of, of.indices)
                wanted = 3 * eager.update((2 * values[other.indices]).square(), other)
                assert torch.equal(loss, wanted)
                (got,), (want,) = (torch.autograd.grad(each, values) for each in (loss, wanted))
                assert torch.equal(got, want)
    assert torch.equal(infobatch.scores, eager.scores)
    assert infobatch.recorded == eager.recorded == len(infobatch.plan or [])


def test_scores_of_their_own_and_a_batchs_mean() -> None:
    infobatch = with_scores(np.zeros(4))
    batch = Batch(torch.tensor([3, 1]), torch.tensor([2.0, 1.0]))
    loss = infobatch.update(torch.tensor([10.0, 20.0]), batch, scores=torch.tensor([0.5, 0.25]))
    assert loss.item() == 20
    assert infobatch.scores.tolist() == [0, 0.25, 0, 0.5]
    infobatch = make(4, score="bls")
    assert infobatch.update(torch.tensor(3.0), batch).item() == 4.5
    assert infobatch.scores[[3, 1]].tolist() == [3, 3]


@pytest.mark.parametrize("policy", ["soft", "random", "hard", "ucb"])
def test_protected_samples_are_always_kept(policy: str) -> None:
    scores = np.random.default_rng(0).random(300)
    protect = torch.arange(300) % 5 == 0
    infobatch = make(300, policy=policy, protect=protect, ratio=0.9)
    plan = infobatch.sample(0)
    for epoch in range(4):
        plan = infobatch.sample(epoch)
        assert set(range(0, 300, 5)) <= set(plan.indices.tolist())
        assert (plan.weights[protect[plan.indices]] == 1).all()
        assert plan.weights.double().sum().item() == pytest.approx(300) or policy in ("hard", "ucb")
        for batch in plan.batches(100):
            infobatch.update(torch.from_numpy(scores)[batch.indices], batch)
    assert len(plan) < 250
    with pytest.raises(ValueError, match=r"^protect must be torch.bool of shape \(300,\), got"):
        make(300, protect=protect.float())


def test_what_prunes_nothing_silently_is_told() -> None:
    infobatch = make(20)
    infobatch.sample(0)
    with pytest.warns(UserWarning, match=r"^epoch 1 leaves out nothing: update\(\) was not"):
        infobatch.sample(1)
    infobatch = make(20)
    first, second = infobatch.sample(0).batches(10)
    for batch in (first, first, second):  # each twice, as by SAM's second loss
        infobatch.update(torch.ones(10), batch)
    with pytest.warns(UserWarning, match="^losses of two passes came since epoch 0 was drawn"):
        infobatch.update(torch.ones(10), second)
