"""Which samples an epoch leaves out: pure functions of device tensors, none of which waits.

A policy sees a `View` and gives a `Choice`. What follows is the same for all: k of the n prunable
samples are kept, exactly, all others too, and the epoch's order is shuffled apart from the choice.
Dimensions: N samples, n prunable, k of those kept, K samples of the epoch before.

A sample that was not seen yet, or whose last loss was not finite, is NaN and always kept. So the
first epoch is full under every policy.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infobatch_fast.budget import SCHEDULES, Budget, Schedule
from infobatch_fast.errors import reason, unknown_name
from infobatch_fast.kernels import reference

POOL = 1.2  # of orderdp: samples drawn for each one kept
WINDOW = 200  # of repb: samples in a row of an epoch, across which the model hardly changes
NEWEST = 0.8  # of ucb: weight of the newest loss in mean and variance
CONFIDENCE = 1.0  # of ucb: deviations added to the mean
GROUPS, SPAN = 5, 4  # of seta: groups of like loss, and how many in a row it draws from
BINS = 1024  # of seta's histogram
BLS_NEWEST = 0.1  # weight of the newest batch's mean loss


@dataclass(frozen=True)
class History:
    """The epochs that were drawn, as a policy sees them.

    Attributes:
        order: (K,) int64, the epoch before in its order.
        times: (N,) int32, how many epochs each sample was in.
        latest: (N,) int32, the last epoch that it was in, from 0.
    """

    order: Tensor
    times: Tensor
    latest: Tensor


@dataclass(frozen=True)
class View:
    """What a policy may look at, and not write to.

    Attributes:
        scores: (N,) float32, NaN where not seen or not finite.
        epoch: to be drawn, from 0.
        tail: the first epoch of the last (1 - delta) of the run; one beyond it is drawn only
            without annealing.
        budget: how many of n prunable samples are kept, `budget.kept_on_device(n)`.
        key: a function of (seed, epoch), which `generator` starts from.
        history: the epochs before; None for a policy that does not ask for it.
        labels: (N,) int64, if the `InfoBatch` was given them.
        memory: what the policy left in the `Choice` of the epoch before; empty at first.
    """

    scores: Tensor
    epoch: int
    tail: int
    budget: Budget
    key: int
    history: "History | None" = None
    labels: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> Tensor:
        """(N,) bool: the samples with a score."""
        return self.scores.isfinite()

    @cached_property
    def generator(self) -> torch.Generator:
        """Of the scores' device; made on first use, since kernels draw without one."""
        return torch.Generator(self.scores.device).manual_seed(self.key)


class Choice(NamedTuple):
    """What a policy gives.

    Attributes:
        prunable: (N,) bool; all others are kept with weight 1.
        priority: (N,) float32 without NaN where prunable: the k highest are kept, of equal ones
            those that the lot falls on. None draws the k uniformly.
        weights: (N,) float32, finite, loss weights of what is kept; None is n/k for the prunable
            ones of an unbiased policy and 1 for everything else.
        memory: for the next epoch's view.
    """

    prunable: Tensor
    priority: Tensor | None = None
    weights: Tensor | None = None
    memory: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Policy:
    """A policy and what is known of it.

    Attributes:
        choose: the function.
        unbiased: whether, with rescaling, the expected gradient of an epoch is that of all data.
        memory: names of the tensors that it remembers from epoch to epoch.
        history: whether it asks for the view's.
    """

    choose: Callable[[View], Choice]
    _: KW_ONLY
    unbiased: bool = False
    memory: tuple[str, ...] = ()
    history: bool = False


def soft(view: View) -> Choice:
    """InfoBatch (arXiv:2303.04947): of the samples below the mean score, a uniform part."""
    return Choice(reference.well_learned(view.scores))


def random(view: View) -> Choice:
    """Of all samples seen, whatever their loss, a uniform part: a fresh subset each epoch."""
    return Choice(view.seen)


def hard(view: View) -> Choice:
    """Of all samples seen, those of lowest loss go."""
    return Choice(view.seen, priority=view.scores)


def orderdp(view: View) -> Choice:
    """OrderDP (ICLR 2026): of a uniform pool of 1.2 k samples, the k of highest loss are kept.

    For r up to 1/6 the pool is everybody, as in `hard`. Where whole batches round k up beyond the
    pool, the rest is drawn from all others by lot.
    """
    seen = view.seen
    size = (POOL * view.budget.kept_on_device(seen.sum()).double()).round()
    order = torch.randperm(seen.numel(), generator=view.generator, device=seen.device)
    drawn = seen[order]
    pool = torch.zeros_like(seen)
    pool[order] = drawn & (drawn.cumsum(0) <= size)
    return Choice(seen, priority=view.scores.masked_fill(~pool, -torch.inf))


def repb(view: View) -> Choice:
    """RePB (ICLR 2026): judged against the batch that the sample was last trained in.

    Prunable are the samples below the mean of their window of the epoch before, all of whose losses
    one state of the model gave, and those that sat it out, which so come back with probability
    1 - r. A sample's weight is the epochs drawn over those that it was drawn for, which evens out
    over time. In the source each sample has a draw of its own; here k of n are kept, exactly.
    """
    scores, history = view.scores, view.history
    if history is None:
        return Choice(torch.zeros_like(scores, dtype=torch.bool))
    order = history.order
    used = scores.index_select(0, order).double()  # a mean of equal scores must equal them
    rows = F.pad(used, (0, -used.numel() % WINDOW), value=torch.nan).view(-1, WINDOW)
    below = (rows < rows.nanmean(1, keepdim=True)).view(-1)[: used.numel()]
    prunable = view.seen.index_copy(0, order, below)
    weights = ((view.epoch + 1) / (history.times.double() + 1)).float()
    return Choice(prunable, weights=weights)


def ucb(view: View) -> Choice:
    """UCB (arXiv:2111.12621): the samples whose mean loss plus deviation is low go.

    Mean and variance are exponential ones of the losses that the sample had when trained on, both
    from 0: a sample that was in few epochs has a large deviation.
    """
    scores = view.scores
    mean, variance = (
        view.memory.get(name, torch.zeros_like(scores)) for name in ("mean", "variance")
    )
    if view.history is not None:
        trained = torch.zeros_like(view.seen).index_fill(0, view.history.order, True) & view.seen
        step = scores - mean
        mean = torch.where(trained, mean + NEWEST * step, mean)
        variance = torch.where(trained, variance + NEWEST * (step.square() - variance), variance)
    priority = mean + CONFIDENCE * variance.sqrt()
    return Choice(view.seen, priority=priority, memory={"mean": mean, "variance": variance})


def seta(view: View) -> Choice:
    """SeTa (CVPR 2025): a uniform part of a window that slides over groups from easy to hard.

    The window is `SPAN` of `GROUPS` groups of like loss, and moves on by one each epoch. In the
    source a uniform part of all is grouped, and what lies outside the window goes too, so that the
    number varies; here k are kept, and where the window holds fewer the nearest groups fill up.
    Groups come from a histogram in the place of k-means: a group's share of the cube root of the
    density is the same for all, which is what k-means tends to in one dimension (a score far beyond
    all others leaves these few bins). The source's last epochs are of a uniform part, which here is
    what --no-anneal does.
    """
    seen, scores = view.seen, view.scores
    if view.epoch >= view.tail:
        return Choice(seen)
    low = scores.masked_fill(~seen, torch.inf).amin()
    width = scores.masked_fill(~seen, -torch.inf).amax() - low
    place = ((scores - low) / width).nan_to_num(0.0).clamp(0, 1)
    bins = (place * BINS).long().clamp(max=BINS - 1)
    counts = torch.zeros(BINS, dtype=torch.int64, device=scores.device)
    counts.index_add_(0, bins, seen.long())
    share = counts.double().pow(1 / 3)
    before = share.cumsum(0) - share / 2
    groups = (GROUPS * before / share.sum()).nan_to_num(0.0).long().clamp(max=GROUPS - 1)
    group = groups.index_select(0, bins)
    first = view.epoch % (GROUPS - SPAN + 1)
    outside = (first - group).clamp(min=0) + (group - first - SPAN + 1).clamp(min=0)
    return Choice(seen, priority=-outside.float())


def none(view: View) -> Choice:
    """Every epoch is full."""
    return Choice(torch.zeros_like(view.scores, dtype=torch.bool))


POLICIES: dict[str, Policy] = {
    "soft": Policy(soft, unbiased=True),
    "random": Policy(random, unbiased=True),
    "hard": Policy(hard),
    "orderdp": Policy(orderdp),
    "repb": Policy(repb, history=True),
    "ucb": Policy(ucb, memory=("mean", "variance"), history=True),
    "seta": Policy(seta),
    "none": Policy(none, unbiased=True),
}


def find(name: str) -> Policy:
    """The policy of a name of `POLICIES`, or of `module:function`, a function from View to Choice.

    Raises:
        ValueError: there is none of that name; TypeError: it is no policy.
    """
    if not isinstance(name, str):
        raise TypeError(f"policy must be a name or 'module:function', got {type(name).__name__}")
    if ":" in name and name not in POLICIES:
        found = imported("policy", name)
        if isinstance(found, Policy):
            return found
        choose: Callable[[View], Choice] = found
        if not callable(choose):
            raise ValueError(f"policy {name} must be a function of a View, got {found!r:.60}")
        return Policy(choose, history=True)
    if name not in POLICIES:
        raise ValueError(unknown_name("policy", name, [*POLICIES, "module:function"]))
    if not isinstance(POLICIES[name], Policy):
        kind = type(POLICIES[name]).__name__
        raise TypeError(f"POLICIES[{name!r}] must be a Policy, got {kind}")
    return POLICIES[name]


def find_schedule(schedule: str | Callable[[float, int, int], float]) -> Schedule:
    """The schedule of a name of `SCHEDULES`, of `module:function`, or that a function is.

    Raises:
        ValueError: there is none of that name.
    """
    if callable(schedule):
        named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
        return Schedule(f"{named.__module__}:{named.__qualname__}", schedule)
    if schedule in SCHEDULES:
        return Schedule(schedule, SCHEDULES[schedule])
    if ":" in str(schedule):
        return Schedule(schedule, imported("ratio_schedule", schedule))
    known = [*SCHEDULES, "module:function"]
    raise ValueError(unknown_name("ratio_schedule", schedule, known))


def imported(argument: str, name: str) -> Any:
    """What `module:function` names; ValueError, which names the argument, where there is none."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` has it: the user's folder
    try:
        return getattr(import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"{argument} {name} cannot be imported: {reason(error)}") from error
    finally:
        sys.path.remove("")


def loss_score(before: Tensor, losses: Tensor) -> Tensor:
    """The loss itself."""
    return losses


def bls(before: Tensor, losses: Tensor) -> Tensor:
    """BLS (CVPR 2026): the exponential mean of the batch's mean loss, each time it was in one.

    It begins with the mean of the sample's first batch. The source, which has no losses of samples,
    trains on that mean times the batch's mean weight, as `update` does of a loss (); of losses (B,)
    each has its own weight, which is what makes them unbiased.

    Args:
        before: (B,) float32, the samples' scores so far, NaN where there is none.
        losses: (B,) floating.

    Returns:
        (B,) of the dtype of `losses`; not finite where the sample's loss is not.
    """
    finite = losses.isfinite()
    mean = losses.where(finite, 0.0).sum() / finite.sum()
    blended = torch.where(before.isfinite(), before + BLS_NEWEST * (mean - before), mean)
    return torch.where(finite, blended, torch.nan).to(losses.dtype)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"loss": loss_score, "bls": bls}
