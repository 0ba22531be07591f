"""The part "choose" of `agreement.py`: epochs drawn by kernels and by torch, sample for sample.

Dimensions: N samples, n prunable, k of those kept, K kept in all.
"""

import warnings
from collections.abc import Sequence

import torch
from agreement_figures import Bench, relative, ulps, unequal
from overhead_sides import draw_scores
from torch import Tensor

from infobatch_fast.infobatch import InfoBatch, Plan, _mix
from infobatch_fast.kernels import prune_torch, reference
from infobatch_fast.kernels.select import Kernels, triton_kernels

PART = "choose"
RATIO = 0.5
LAST_PLACE = 1  # steps of float32 that thresholds may lie apart, which add in different orders
WEIGHTS = 1e-6  # that the sum of the weights may be off, of N


def find_kernels(device: torch.device) -> tuple[Kernels | None, str]:
    """The kernels of a device, or why there are none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernels = triton_kernels(device)
    if device.type != "cuda":
        return kernels, "no kernels on a CPU, where torch's operations do all of it"
    said = [str(warning.message) for warning in caught]
    return kernels, said[-1] if said else "torch's operations stand in for the Triton kernels"


def make_scores(samples: int, seed: int) -> Tensor:
    """(N,) float32 on the CPU, one in 17 not seen."""
    scores = torch.from_numpy(draw_scores(samples, seed))
    scores[1::17] = torch.nan
    return scores


def measure_choosing(bench: Bench, kernels: Kernels | None, why: str, sizes: Sequence[int]) -> None:
    """Rows of the kernels against torch's operations on the CPU, and of whole epochs.

    Args:
        bench: whose rows they are.
        kernels: of its device.
        why: there are none.
        sizes: N.
    """
    if kernels is None:  # on a GPU it is they that were to be shown
        bench.add_absent(PART, {"what": "kernels"}, why, failed=bench.cuda)
    for samples in sizes:
        with bench.guard(PART, {"what": "all", "samples": samples}):
            scores = make_scores(samples, bench.seed).to(bench.device)
            limit = (kernels.threshold if kernels else reference.threshold)(scores)
            if kernels is not None:
                compare_kernels(bench, kernels, scores, limit)
            infobatch = InfoBatch(samples, 3, RATIO, 1.0, bench.seed, bench.device)
            infobatch.scores.copy_(scores)
            plan = check_epoch(bench, infobatch, limit)
            if kernels is not None:
                compare_plan(bench, plan, scores, limit)


def compare_kernels(bench: Bench, kernels: Kernels, scores: Tensor, limit: Tensor) -> None:
    """Each kernel alone, its inputs the same ones on both sides.

    Args:
        bench: whose rows they are.
        kernels: compared.
        scores: (N,) on the device.
        limit: () the kernel's threshold of them.
    """
    samples, key = scores.numel(), _mix(bench.seed, 1)
    here = scores.cpu()
    off = ulps(limit.cpu(), reference.threshold(here))
    bench.add(PART, {"what": "threshold", "samples": samples}, off, "ULP", LAST_PLACE)
    positions, count = kernels.partition(scores, limit)
    want, want_count = prune_torch.partition(here, limit.cpu())
    n = int(want_count)
    k = kept(n)
    weight = n / k if k else 1.0
    chosen = kernels.choose(want.to(bench.device), n, k, weight, key)
    expected = prune_torch.choose(want, n, k, weight, key)
    order = kernels.shuffle(samples, key, bench.device)
    for what, got, wanted in (
        ("partition", (positions, count), (want, want_count)),
        ("choose", chosen, expected),
        ("shuffle", (order,), (prune_torch.shuffle(samples, key, "cpu"),)),
    ):
        other = sum(unequal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
        bench.add(PART, {"what": what, "samples": samples}, other, "unequal elements", 0)


def compare_plan(bench: Bench, plan: Plan, scores: Tensor, limit: Tensor) -> None:
    """A whole epoch against what torch draws on the CPU, given the device's threshold.

    Args:
        bench: whose rows they are.
        plan: drawn on the device.
        scores: (N,) that it was drawn from.
        limit: () the device's threshold of them.
    """
    samples, key = scores.numel(), _mix(bench.seed, plan.epoch)
    positions, count = prune_torch.partition(scores.cpu(), limit.cpu())
    n = int(count)
    if n:
        indices, weights = prune_torch.choose(positions, n, kept(n), n / kept(n), key)
    else:
        indices, weights = prune_torch.shuffle(samples, key, "cpu"), torch.ones(samples)
    other = unequal(plan.indices.cpu(), indices) + unequal(plan.weights.cpu(), weights)
    case = {"what": "epoch as torch draws it on the CPU", "samples": samples}
    bench.add(PART, case, other, "unequal elements", 0)


def check_epoch(bench: Bench, infobatch: InfoBatch, limit: Tensor) -> Plan:
    """What an epoch must be, whoever draws it.

    Args:
        bench: whose rows they are.
        infobatch: with the scores; its epochs 1 and 2 are drawn.
        limit: () its device's threshold of them.

    Returns:
        Epoch 1.
    """
    samples = infobatch.num_samples
    plan = infobatch.sample(1)
    n = int((infobatch.scores < limit).sum())
    total = plan.weights.sum(dtype=torch.float64).cpu()
    of_all = torch.tensor(samples, dtype=torch.float64)
    state = infobatch.state_dict()
    again, following = infobatch.sample(1), infobatch.sample(2)
    resumed = InfoBatch(samples, 3, RATIO, 1.0, bench.seed, bench.device)
    resumed.load_state_dict(state)
    rows = (
        ("number kept", abs(len(plan) - (samples - n + kept(n))), "samples off", 0),
        ("duplicates", len(plan) - plan.indices.unique().numel(), "samples", 0),
        ("sum of the weights", relative(total, of_all), "of N", WEIGHTS),
        ("the same call twice", differing(again, plan), "unequal elements", 0),
        ("resumed", differing(resumed.sample(2), following), "unequal elements", 0),
    )
    for what, figure, unit, most in rows:
        bench.add(PART, {"what": what, "samples": samples}, figure, unit, most)
    return plan


def differing(got: Plan, want: Plan) -> int:
    """Indices and weights in which two epochs differ."""
    return unequal(got.indices, want.indices) + unequal(got.weights, want.weights)


def kept(n: int) -> int:
    """k, as the design has it."""
    return max(1, round((1 - RATIO) * n)) if n else 0
