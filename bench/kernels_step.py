"""The cases over the B samples of a step and the parameters of a model, and torch's way to each.

Dimensions: B batch, C classes, T parameter tensors of P elements together, R repetitions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernels_checks import Mismatch, lamb_loop, lars_loop
from kernels_work import (
    Call,
    GetKernels,
    Outputs,
    Work,
    bytes_moved,
    check_all,
    compiled,
    copies_of,
)
from torch import Tensor, nn

from infobatch_fast.kernels import reference
from infobatch_fast.train.layerwise import LayerWise
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import LAMB, LARS

SCORES = 1_280_000  # N
SMOOTHING = 0.1
# A step's rate does not tell in its time. These change the weights enough to be checked, and too
# little for a thousand steps on one gradient to overflow.
RATES = {"lars": 0.1, "lamb": 1e-3}


def _batches(batch: int, copies: int, device: torch.device, seed: int) -> list[Any]:
    """R times losses (B,), weights (B,) and indices (B,), the latter all different."""
    random = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(SCORES, generator=random, device=device)
    rows = []
    for i in range(copies):
        losses = torch.empty(batch, device=device).log_normal_(-1.0, 1.0, generator=random)
        weights = torch.rand(batch, generator=random, device=device) + 0.5
        rows.append((losses, weights, order[i * batch : (i + 1) * batch].clone()))
    return rows


def _scores(device: torch.device) -> Tensor:
    return torch.full((SCORES,), torch.nan, device=device)


def update_work(batch: int, kernels: GetKernels, device: torch.device, seed: int) -> Work:
    """The rescaled mean, its backward pass, and the record."""
    moved = bytes_moved("update", batch=batch)
    copies = min(copies_of(moved), SCORES // batch)
    rows = _batches(batch, copies, device, seed)
    leaves = [losses.clone().requires_grad_() for losses, _, _ in rows]
    one = torch.ones((), device=device)

    def make(get: Callable[[], Callable[..., Tensor]]) -> Call:
        update, scores = get(), _scores(device)

        def call(i: int) -> Outputs:
            _, weights, indices = rows[i]
            loss = update(leaves[i], weights, indices, scores)
            (gradient,) = torch.autograd.grad(loss, leaves[i], one)
            return loss.detach(), gradient, scores

        return call

    losses, weights, indices = rows[0]
    mean = (losses.double() * weights.double()).mean()
    written = _scores(device)
    written[indices] = losses
    wanted = [("loss", mean, 1e-5), ("gradient", weights / batch, 1e-5), ("scores", written, 0.0)]
    sides = {
        "ours": lambda: make(lambda: kernels().update),
        "torch": lambda: make(lambda: update_by_torch),
        "compiled": lambda: make(lambda: compiled(update_by_torch)),
    }
    return Work(sides, partial(check_all, wanted), moved, copies)


def update_by_torch(losses: Tensor, weights: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
    """What `update.update` does."""
    reference.record(scores, indices, losses)
    return reference.rescaled_mean(losses, weights)


def record_work(batch: int, kernels: GetKernels, device: torch.device, seed: int) -> Work:
    """The record, of a step that is taken."""
    moved = bytes_moved("record", batch=batch)
    copies = min(copies_of(moved), SCORES // batch)
    rows = _batches(batch, copies, device, seed)
    found_inf = torch.zeros((), device=device)

    def make(get: Callable[[], Callable[..., None]]) -> Call:
        record, scores = get(), _scores(device)

        def call(i: int) -> Outputs:
            losses, _, indices = rows[i]
            record(scores, indices, losses, found_inf)
            return (scores,)

        return call

    written = _scores(device)
    written[rows[0][2]] = rows[0][0]
    sides = {
        "ours": lambda: make(lambda: kernels().record),
        "torch": lambda: make(lambda: reference.record),
        "compiled": lambda: make(lambda: compiled(reference.record)),
    }
    return Work(sides, partial(check_all, [("scores", written, 0.0)]), moved, copies)


def cross_entropy_work(
    batch: int, classes: int, kernels: GetKernels, device: torch.device, seed: int
) -> Work:
    """Losses, their rescaled mean and the gradient of the logits, in bfloat16 as under autocast."""
    moved = bytes_moved("cross_entropy", batch=batch, classes=classes)
    copies = min(copies_of(moved), SCORES // batch)
    random = torch.Generator(device).manual_seed(seed)
    weights = [weights for _, weights, _ in _batches(batch, copies, device, seed)]
    logits, labels = [], []
    for _ in range(copies):
        drawn = torch.randn(batch, classes, generator=random, device=device) * 3
        logits.append(drawn.bfloat16().requires_grad_())
        labels.append(torch.randint(classes, (batch,), generator=random, device=device))
    one = torch.ones((), device=device)

    def ours() -> Call:
        function = kernels().cross_entropy_gradient
        return lambda i: function(logits[i], labels[i], weights[i], label_smoothing=SMOOTHING)

    def make(forward: Callable[..., Outputs]) -> Call:
        def call(i: int) -> Outputs:
            loss, losses = forward(logits[i], labels[i], weights[i])
            (gradient,) = torch.autograd.grad(loss, logits[i], one)
            return loss.detach(), losses.detach(), gradient

        return call

    exact = logits[0].detach().double()
    likely = exact.log_softmax(1)
    target = F.one_hot(labels[0], classes) * (1 - SMOOTHING) + SMOOTHING / classes
    losses = -(target * likely).sum(1)
    slope = weights[0].double() / batch
    gradient = (likely.exp() - target) * slope[:, None]
    wanted = [
        ("loss", (losses * slope).sum(), 1e-4),
        ("losses", losses, 1e-4),
        ("gradient", gradient, 8e-3),  # in bfloat16, which the interpreter cuts to: 2**-7
    ]
    sides = {
        "ours": ours,
        "torch": lambda: make(cross_entropy_by_torch),
        "compiled": lambda: make(compiled(cross_entropy_by_torch)),
    }
    return Work(sides, partial(check_all, wanted), moved, copies)


def cross_entropy_by_torch(logits: Tensor, labels: Tensor, weights: Tensor) -> Outputs:
    """The loss () and the losses (B,), as the training step has them without the kernels."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=SMOOTHING)
    return reference.rescaled_mean(losses, weights), losses


def resnet50_params(device: torch.device, seed: int) -> list[Tensor]:
    """ResNet-50's parameters as it is trained: float32, channels_last."""
    model: nn.Module = make_model("r50", seed=seed)
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    return [p.detach() for p in model.parameters()]


def optimizer_work(name: str, params: Callable[[], Sequence[Tensor]], seed: int) -> Work:
    """Steps of LARS or LAMB that find a gradient that is not finite, as the training step asks."""
    start = params()
    device = start[0].device
    random = torch.Generator(device).manual_seed(seed)
    grads = [torch.empty_like(p).normal_(0, 1e-2, generator=random) for p in start]
    elements = sum(p.numel() for p in start)

    def make(fused: bool, compiling: bool = False) -> Call:
        weights = [nn.Parameter(p.clone()) for p in start]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        optimizer = make_layerwise(name, weights, fused)
        optimizer.finds_inf = True
        optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        step = compiled(optimizer.step) if compiling else optimizer.step

        def call(i: int) -> Outputs:
            step()
            return tuple(weights)

        return call

    def loop(dtype: torch.dtype = torch.float32) -> Call:
        weights, slopes = ([t.to(dtype, copy=True) for t in tensors] for tensors in (start, grads))
        return loop_call(name, weights, slopes)

    wanted = loop(torch.float64)(0)

    def check(outputs: Outputs) -> None:
        for got, want, before in zip(outputs, wanted, start, strict=True):
            # Of what a step changes, beyond the rounding of the parameter itself.
            change = want - before.double()
            slack = 1e-3 * change.abs() + 1e-6 * change.abs().max() + 1.2e-7 * before.abs()
            if not bool(((got.double() - want).abs() <= slack).all()):
                raise Mismatch(f"a parameter {tuple(got.shape)} is not what a step makes of it")

    sides: dict[str, Callable[[], Call]] = {
        "ours": partial(make, True),
        "torch": partial(make, False),
        "compiled": partial(make, False, True),
        "loop": loop,
    }
    more = {"parameter_tensors": len(start), "parameter_elements": elements}
    return Work(sides, check, bytes_moved(name, params=elements), more=more)


def loop_call(name: str, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Call:
    """Steps of the loop over tensors, in place, from the optimizer's first step on."""
    lr, beta, count = (weights[0].new_full((), value) for value in (RATES[name], 0.9, 0.0))
    one, other = ([torch.zeros_like(w) for w in weights] for _ in range(2))

    def call(i: int) -> Outputs:
        if name == "lars":
            lars_loop(weights, grads, one, lr, beta)
        else:
            lamb_loop(weights, grads, one, other, count, lr, beta)
        return tuple(weights)

    return call


def make_layerwise(name: str, weights: Sequence[Tensor], fused: bool) -> LayerWise:
    """LARS or LAMB with learning rate and momentum in tensors, as the trainer makes them."""
    device = weights[0].device
    rate, inertia = (torch.full((), value, device=device) for value in (RATES[name], 0.9))
    if name == "lars":
        return LARS(weights, rate, momentum=inertia, fused=fused)
    return LAMB(weights, rate, betas=(inertia, 0.999), fused=fused)
