"""The Triton kernels beside the torch operations that stand in for them, and the bytes they move.

Every side's GB/s are of the bytes that our launches move, so that they compare as seconds do; the
sums that the launches hand on to each other are left out. A result must be right, told without the
code that is measured, before a side is timed.

A repetition works on buffers of its own, and before the clock starts more than the L2 cache is
read: no input lies in it. Up to 1 GiB moved, the repetitions are one CUDA graph, so that no launch
from the host is in the time; what is larger is one call behind a backlog.

Dimensions: N samples, n well-learned, k of those kept, K kept in all, B batch, C classes, P
elements of the parameters, R repetitions.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Absent, Side, on_device, require
from torch import Tensor, nn

from infobatch_fast.errors import reason
from infobatch_fast.kernels import reference, select
from infobatch_fast.kernels.select import Kernels
from infobatch_fast.train.optim import LARS
from sides.pruning import RATIO, check_epoch, check_even
from sides.steps import LR, MOMENTUM, make_network

EPOCH = ("threshold", "partition", "choose", "shuffle", "choosing")
KEY = 0x9E3779B97F4A7C15  # of our shuffles
SMOOTHING = 0.1
SCORES = 1_280_000  # N of what a step does
MOST_COPIES, COPIED_BYTES = 64, 2**30
# torch.compile takes no generator as an argument, and a CUDA graph none that it was not told of.
TORCHS_OWN: Any = None

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]  # torch.compile, or nothing


@dataclass(frozen=True)
class Case:
    """One kernel at one size, with its buffers in memory.

    Attributes:
        ours: by the kernels.
        plain: by torch's operations, of which those that can be compiled are wrapped.
        arguments: of each repetition, R.
        check: raises an error unless the outputs of repetition 0 are right.
        moved: bytes that a repetition of ours moves.
        more: for the row.
    """

    ours: Callable[[Kernels], Function]
    plain: Callable[[Wrap], Function]
    arguments: Sequence[tuple[Any, ...]]
    check: Callable[..., None]
    moved: int
    more: Mapping[str, Any] = field(default_factory=dict)


def kernel_sides(
    build: Callable[[], Case], device: torch.device, compiled: bool
) -> dict[str, Callable[[], Side]]:
    """Ours and torch, and torch's compiled, of a case that is built once."""
    built = cache(build)

    def ready(function: Callable[[Case], Function]) -> Side:
        if torch.device(device).type == "cuda":
            torch._dynamo.reset()  # sizes seen before would count against the limit on them
        case = built()
        return _ready(case, function(case), device)

    whole: Wrap = partial(torch.compile, fullgraph=True, dynamic=False)
    sides = {
        "ours": lambda: ready(lambda case: case.ours(proven(device))),
        "torch": lambda: ready(lambda case: case.plain(lambda function: function)),
    }
    if compiled:
        sides["compiled"] = lambda: ready(lambda case: case.plain(whole))
    return sides


@cache
def proven(device: torch.device) -> Kernels:
    """The Triton kernels, shown to agree with torch on an example; raises Absent."""
    if device.type != "cuda":
        raise Absent("the kernels need a CUDA device")
    try:
        kernels = select.load()
        with torch.cuda.device(device):
            select.prove(kernels, device)
    except Exception as error:  # no Triton, or of its compiler or the driver, or of `prove`
        raise Absent(f"the kernels are not used: {reason(error)}") from None
    return kernels


def _ready(case: Case, function: Function, device: torch.device) -> Side:
    outputs = function(*case.arguments[0])
    case.check(*(outputs if isinstance(outputs, tuple) else (outputs,)))
    del outputs
    calls = [partial(function, *arguments) for arguments in case.arguments]
    how: Any = {"clock": on_device, "moved": case.moved}
    if device.type == "cuda" and case.moved <= COPIED_BYTES:
        for call in calls:  # whatever is compiled or tuned at a first call cannot be captured
            call()
        torch.cuda.synchronize(device)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                # All kept until the end, or one repetition would write where the last one did.
                kept = [call() for call in calls]
            del kept

            def replay() -> None:
                assert calls  # they hold the buffers, which the graph does not
                graph.replay()

            return Side(replay, len(calls), more={**case.more, "clock": "graph"}, **how)
        except RuntimeError:  # it asks something of the host
            torch.cuda.set_stream(before)  # torch leaves its own where a capture fails
            torch.cuda.synchronize(device)
    turns = itertools.cycle(calls)
    more = {**case.more, "clock": "backlog" if device.type == "cuda" else "wall"}
    return Side(lambda: next(turns)(), more=more, **how)


def _copies(moved: int) -> int:
    """R: as many as make the launch of a graph small, within a bound on their memory."""
    return max(1, min(MOST_COPIES, COPIED_BYTES // moved))


def epoch_case(kernel: str, samples: int, device: torch.device, seed: int) -> Case:
    """The kernels over N samples, whose scores lie as losses do in the middle of a training."""
    random = torch.Generator(device).manual_seed(seed)
    scores = torch.empty(samples, device=device).log_normal_(-1.0, 1.0, generator=random)
    scores[::1000] = torch.nan  # not seen
    limit = reference.threshold(scores)
    prunable = reference.well_learned(scores)
    n = int(prunable.sum())
    k = max(1, round((1 - RATIO) * n))
    kept, weight = samples - n + k, n / k
    position = 4 if samples < 1 << 31 else 8
    moved = {
        "threshold": 4 * samples,  # the scores read
        "partition": (8 + position) * samples,  # read to count and to place; positions written
        # Positions read (the sector that each lies in has 32); indices of 8 and weights written.
        "choose": (position + 12) * kept,
        "shuffle": 8 * samples,  # indices written
        "choosing": (12 + position) * samples + (position + 12) * kept,  # the first three
    }[kernel]
    copies = _copies(moved)
    more = {"moved_sectors_bytes": moved + (32 - position) * kept} if kernel == "choose" else {}
    mean = scores.nanmean(dtype=torch.float64)
    whole = partial(check_epoch, prunable, n, k)

    def ours(kernels: Kernels, scores: Tensor) -> tuple[Tensor, Tensor]:
        positions, _ = kernels.partition(scores, kernels.threshold(scores))
        return kernels.choose(positions, n, k, weight, KEY)

    def torchs(scores: Tensor) -> tuple[Tensor, Tensor]:
        return reference.choose(reference.well_learned(scores), n, k, weight, TORCHS_OWN)

    make, plain, check = {  # ours, torch's, and what the outputs must be
        "threshold": (
            lambda kernels: kernels.threshold,
            reference.threshold,
            lambda got: torch.testing.assert_close(got.double(), mean, rtol=1e-6, atol=0),
        ),
        "partition": (
            lambda kernels: lambda scores: kernels.partition(scores, limit),
            lambda scores: _partition(scores, limit, n),
            partial(check_partition, prunable, n),
        ),
        "choose": (
            lambda kernels: lambda positions: kernels.choose(positions, n, k, weight, KEY),
            lambda positions: _choose(positions, n, k, weight),
            whole,
        ),
        "shuffle": (
            lambda kernels: lambda: kernels.shuffle(samples, KEY, device),
            lambda: torch.randperm(samples, device=device),
            partial(check_permutation, samples),
        ),
        "choosing": (lambda kernels: partial(ours, kernels), torchs, whole),
    }[kernel]
    source = _partition(scores, limit, n)[0] if kernel == "choose" else scores
    arguments = [(source.clone(),) if kernel != "shuffle" else () for _ in range(copies)]
    return Case(make, lambda wrap: wrap(plain), arguments, check, moved, more)


def _partition(scores: Tensor, limit: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What `partition` gives, n known, without a wait for the host."""
    prunable = (scores < limit) & (scores > -torch.inf)
    first = torch.nonzero_static(prunable, size=n)
    rest = torch.nonzero_static(~prunable, size=scores.numel() - n)
    dtype = torch.int32 if scores.numel() < 1 << 31 else torch.int64
    return torch.cat([first, rest]).view(-1).to(dtype), prunable.sum()


def _choose(positions: Tensor, n: int, k: int, weight: float) -> tuple[Tensor, Tensor]:
    """What `choose` gives, in the way of `reference.choose`."""
    device = positions.device
    chosen = torch.randperm(n, device=device)[:k]
    indices = torch.cat([positions[n:], positions.index_select(0, chosen)]).long()
    order = torch.randperm(indices.numel(), device=device)
    weights = torch.ones(indices.numel(), device=device)
    weights[positions.numel() - n :] = weight
    return indices.index_select(0, order), weights.index_select(0, order)


def record_case(batch: int, device: torch.device, seed: int) -> Case:
    """The record of a step that is taken."""
    moved = 16 * batch  # loss and index of 8 read, score written
    copies = _copies(moved)
    random = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(SCORES, generator=random, device=device)
    scores = torch.full((SCORES,), torch.nan, device=device)
    found_inf = torch.zeros((), device=device)
    rows = []
    for i in range(copies):
        losses = torch.empty(batch, device=device).log_normal_(-1.0, 1.0, generator=random)
        rows.append((scores, order[i * batch : (i + 1) * batch].clone(), losses, found_inf))

    def written(function: Function) -> Function:
        def call(scores: Tensor, *rest: Tensor) -> Tensor:
            function(scores, *rest)
            return scores

        return call

    def check(scores: Tensor) -> None:
        torch.testing.assert_close(scores[rows[0][1]], rows[0][2], rtol=0, atol=0)

    return Case(
        lambda kernels: written(kernels.record),
        lambda wrap: written(wrap(reference.record)),
        rows,
        check,
        moved,
    )


def cross_entropy_case(batch: int, classes: int, device: torch.device, seed: int) -> Case:
    """Losses, their rescaled mean and the gradient of the logits, in bfloat16 as under autocast."""
    # Logits read and gradients written in bfloat16; label of 8, weight and loss a sample.
    moved = 4 * batch * classes + 16 * batch
    random = torch.Generator(device).manual_seed(seed)
    rows = []
    for _ in range(_copies(moved)):
        logits = torch.randn(batch, classes, generator=random, device=device) * 3
        labels = torch.randint(classes, (batch,), generator=random, device=device)
        weights = torch.rand(batch, generator=random, device=device) + 0.5
        rows.append((logits.bfloat16().requires_grad_(), labels, weights))

    def forward(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        how: Any = {"reduction": "none", "label_smoothing": SMOOTHING}
        losses = F.cross_entropy(logits.float(), labels, **how)
        return reference.rescaled_mean(losses, weights), losses

    def plain(wrap: Wrap) -> Function:
        wrapped = wrap(forward)

        def call(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            loss, losses = wrapped(logits, labels, weights)
            (gradient,) = torch.autograd.grad(loss, logits)
            return loss.detach(), losses.detach(), gradient

        return call

    def check(*got: Tensor) -> None:
        logits, labels, weights = rows[0]
        likely = logits.detach().double().log_softmax(1)
        target = F.one_hot(labels, classes) * (1 - SMOOTHING) + SMOOTHING / classes
        losses, slope = -(target * likely).sum(1), weights.double() / batch
        wanted = (losses * slope).sum(), losses, (likely.exp() - target) * slope[:, None]
        for a, b, relative in zip(got, wanted, (1e-4, 1e-4, 8e-3), strict=True):
            most = 1e-2 * relative * b.abs().max().item()  # the gradient is in bfloat16
            torch.testing.assert_close(a.double(), b, rtol=relative, atol=most)

    return Case(
        lambda kernels: partial(kernels.cross_entropy_gradient, label_smoothing=SMOOTHING),
        plain,
        rows,
        check,
        moved,
    )


def lars_case(model: str, device: torch.device, seed: int) -> Case:
    """Steps of LARS that find a gradient that is not finite, as the training step asks."""
    network = make_network(model, torch.channels_last, seed, device)
    start = [parameter.detach() for parameter in network.parameters()]
    random = torch.Generator(device).manual_seed(seed)
    grads = [torch.empty_like(w).normal_(0, 1e-2, generator=random) for w in start]
    elements = sum(w.numel() for w in start)

    def make(fused: bool, wrap: Wrap) -> Function:
        weights = [nn.Parameter(w.clone()) for w in start]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        lr, momentum = (torch.full((), value, device=device) for value in (LR, MOMENTUM))
        optimizer: Any = LARS(weights, lr, momentum=momentum, fused=fused)
        optimizer.finds_inf, optimizer.found_inf = True, torch.zeros((), device=device)
        step = wrap(optimizer.step)

        def call() -> tuple[Tensor, ...]:
            step()
            return tuple(weights)

        return call

    def check(*weights: Tensor) -> None:
        for w, g, got in zip(start, grads, weights, strict=True):
            # From a momentum of 0: w - lr * trust * (g + decay w), in float64.
            w, g = w.double(), g.double()
            of_w, of_g = w.norm(), g.norm()
            trust = 0.001 * of_w / (of_g + 5e-4 * of_w) if of_w > 0 else 1.0
            change = LR * trust * (g + 5e-4 * w).clamp(-10, 10)
            slack = 1e-3 * change.abs().max().item() + 1.2e-7 * w.abs().max().item()
            torch.testing.assert_close(got.double(), w - change, rtol=0, atol=slack)

    return Case(
        lambda kernels: make(True, lambda step: step),
        partial(make, False),
        [()],
        check,
        # Norms read parameters and gradients; the step reads these and the momentum, and writes
        # parameters and momentum: seven times float32.
        28 * elements,
        {"parameter_elements": elements},
    )


def check_partition(prunable: Tensor, n: int, positions: Tensor, count: Tensor) -> None:
    """Both parts hold what they must, in ascending order."""
    parts = positions[:n], positions[n:]
    require((positions.shape, int(count)) == (prunable.shape, n), "other counts")
    require(prunable[parts[0]].all() and not prunable[parts[1]].any(), "one in the wrong part")
    require(all((part[1:] > part[:-1]).all() for part in parts), "a part does not ascend")


def check_permutation(samples: int, indices: Tensor) -> None:
    """Each of [0, N) once, shuffled."""
    require(indices.shape == (samples,), "other counts")
    seen = torch.zeros(samples, dtype=torch.bool, device=indices.device)
    seen[indices] = True
    require(seen.all(), "a sample twice")
    check_even(indices)
