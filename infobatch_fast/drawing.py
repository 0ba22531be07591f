"""An epoch drawn from its view: which samples, in which order, with which weights.

Dimensions: N samples, n prunable, k of those kept, K kept in all, B batch.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infobatch_fast.kernels import reference
from infobatch_fast.kernels.select import Kernels
from infobatch_fast.plan import Plan
from infobatch_fast.policies import Choice, Policy, View, soft
from infobatch_fast.pruning import Pruning


def draw(
    view: View,
    pruning: Pruning,
    policy: Policy,
    kernels: Kernels | None,
    protected: Tensor | None,
    batch_size: int | None,
) -> tuple[Plan, Mapping[str, Tensor]]:
    """The plan, and the policy's memory; one host sync.

    Args:
        policy: of the pruning's name.
        kernels: of the scores' device; None is torch's operations.
        protected: (N,) bool, samples that stay in.
        batch_size: B that K is to be a multiple of, where that can be.

    Raises:
        TypeError, ValueError: the policy gave something else than a `Choice` of (N,) tensors.
    """
    scores, limit = view.scores, None
    if kernels is not None and policy.choose is soft and protected is None:
        # It needs no mask: the kernel compares as it goes.
        choice, limit = Choice(scores), kernels.threshold(scores)
    else:
        choice = choice_of(view, pruning.policy, policy)
    positions, no_number = choice.prunable, scores.numel() + 1
    if protected is not None:
        positions = positions & ~protected
    priority = choice.priority
    if priority is not None:
        unknown = (positions & priority.isnan()).any()
        count = positions.count_nonzero() - no_number * unknown
    elif kernels is not None:
        positions, count = kernels.partition(positions, limit)
    else:
        count = positions.count_nonzero()
    if choice.weights is not None:
        count = count - 2 * no_number * ~choice.weights.isfinite().all()
    n = int(count)  # the epoch's one host sync: K sizes the plan and the loader
    if n < 0:
        rule = "priority {} must not be NaN where prunable, got NaN"
        if n < -no_number:
            rule = "weights {} must be finite, got others"
        raise ValueError(rule.format(f"of policy {pruning.policy}"))
    if n == 0:
        return draw_all(view, kernels), choice.memory
    k = keep(n, view.budget.kept(n), scores.numel(), batch_size)
    weight = n / k if pruning.rescale and policy.unbiased else 1.0
    if kernels is not None and priority is None:  # they draw uniformly
        indices, weights = kernels.choose(positions, n, k, weight, view.key)
    else:
        how = view.generator, priority
        indices, weights = reference.choose(positions, n, k, weight, *how)
    if choice.weights is not None and pruning.rescale:
        weights = choice.weights.index_select(0, indices)
    ratio = 1 - view.budget.kept(n) / n
    return Plan(view.epoch, scores.numel(), n, indices, weights, ratio), choice.memory


def draw_all(view: View, kernels: Kernels | None) -> Plan:
    """The plan of a full epoch."""
    scores = view.scores
    if kernels is not None:
        order = kernels.shuffle(scores.numel(), view.key, scores.device)
    else:
        generator = torch.Generator(scores.device).manual_seed(view.key)  # the view's may be used
        order = torch.randperm(scores.numel(), generator=generator, device=scores.device)
    return Plan(view.epoch, scores.numel(), 0, order, torch.ones_like(scores))


def choice_of(view: View, name: str, policy: Policy) -> Choice:
    """What the policy gives, which may be the user's own."""
    choice, number = policy.choose(view), view.scores.numel()
    if not isinstance(choice, Choice):
        raise TypeError(f"policy {name} must give a Choice, got {type(choice).__name__}")
    expect(f"prunable of policy {name}", choice.prunable, torch.bool, number)
    for what, given in (("priority", choice.priority), ("weights", choice.weights)):
        if given is not None:
            expect(f"{what} of policy {name}", given, torch.float32, number)
    expected, memory = policy.memory, choice.memory
    if sorted(memory) != sorted(expected):
        declared, got = (", ".join(sorted(names)) or "none" for names in (expected, memory))
        raise ValueError(
            f"memory of policy {name} must be as Policy(memory=...) names it, {declared}, got {got}"
        )
    for key, value in memory.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"memory {key} of policy {name} must be a tensor, got {kind}")
    return choice


def expect(name: str, given: Any, dtype: torch.dtype, number: int) -> None:
    """Raise ValueError unless it is a tensor (number,) of the dtype."""
    if isinstance(given, Tensor):
        if given.shape == (number,) and given.dtype == dtype:
            return
        got = f"{given.dtype} of shape {tuple(given.shape)}"
    else:
        got = type(given).__name__
    raise ValueError(f"{name} must be {dtype} of shape {(number,)}, got {got}")


def keep(n: int, target: float, num_samples: int, batch_size: int | None) -> int:
    """k: the target rounded, or the count nearest to it with which K is a multiple of B."""
    exact = max(1, round(target))
    if batch_size is None:
        return exact
    remainder = (n - num_samples) % batch_size  # K % B == 0 iff k % B == remainder
    below = remainder + (math.floor(target) - remainder) // batch_size * batch_size
    whole = [k for k in (below, below + batch_size) if 1 <= k <= n]
    return min(whole, key=lambda k: abs(k - target), default=exact)


def key_of(seed: int, epoch: int) -> int:
    """A 64-bit generator seed that either argument changes wholly (SplitMix64 twice)."""
    mask = (1 << 64) - 1
    value = 0
    for part in (seed, epoch):
        value = (value ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        value ^= value >> 31
    return value
