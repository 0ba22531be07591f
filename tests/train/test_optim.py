"""LARS and LAMB against plain loops; skipped steps and saved states are in test_step.py."""

import copy
import itertools
from typing import Any

import pytest
import torch
from steps_made import assert_same
from torch import Tensor, nn

from infobatch_fast.train.optim import LAMB, LARS, OPTIMIZERS, make_optimizer
from infobatch_fast.train.schedule import set_schedule

TOLERANCE = 2e-5  # relative to the largest element, after STEPS steps
STEPS = 25
CPU = torch.device("cpu")


def parameters(device: Any = CPU) -> list[Any]:
    """Weights, biases, channels_last, a norm of 0, a scalar, an empty one, one with holes."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=g)).to(device)

    tensors = [
        draw(8, 3, 3, 3).to(memory_format=torch.channels_last),
        draw(16, 8, 1, 1).to(memory_format=torch.channels_last),
        draw(16),
        torch.zeros(5, device=device),
        draw(),
        draw(0, 4),
        draw(7, 130).t(),
        draw(6, 10)[:, ::2],
        draw(4, 9, scale=1e3),  # little gradient: trust above its bound
        draw(65),
    ]
    return [nn.Parameter(t) for t in tensors]


def gradients(params: list[Any], step: int) -> list[Tensor]:
    """Gradients of one step, some beyond the clip, one all zero, one in another memory order."""
    g = torch.Generator().manual_seed(100 + step)
    factors = {2: 30.0, 8: 1e-4, 9: 0.0}
    drawn = [torch.randn(p.shape, generator=g) * factors.get(i, 1.0) for i, p in enumerate(params)]
    return [grad.to(p.device) for p, grad in zip(params, drawn, strict=True)]


def set_gradients(params: list[Any], step: int) -> None:
    for p, grad in zip(params, gradients(params, step), strict=True):
        # A convolution's as autograd lays it out, which torch's fused optimizers insist on.
        p.grad = torch.empty_like(p).copy_(grad) if p.dim() == 4 else grad


def schedule(step: int) -> tuple[float, float]:
    return 0.2 + 0.05 * (step % 7), 0.85 + 0.01 * (step % 10)


def lars_by_hand(w: Tensor, grads: list[Tensor]) -> Tensor:
    buffer = torch.zeros_like(w)
    for step, g in enumerate(grads):
        lr, momentum = schedule(step)
        norm, gradient = w.norm().item(), g.norm().item()
        trust = 0.02 * norm / (gradient + 0.05 * norm) if norm and gradient else 1.0
        buffer = momentum * buffer + (g + 0.05 * w).clamp(-10, 10)
        w = w - lr * min(trust, 0.3) * buffer
    return w


def lamb_by_hand(w: Tensor, grads: list[Tensor]) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    first = 1.0
    for step, g in enumerate(grads):
        lr, beta1 = schedule(step)
        first = beta1 ** (step + 1)
        m, v = beta1 * m + (1 - beta1) * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - first) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6) + 0.05 * w
        norm, update = w.norm().item(), u.norm().item()
        w = w - lr * min(norm / update if norm and update else 1.0, 10.0) * u
    return w


def build(kind: str, params: Any) -> Any:
    lr, momentum = (torch.tensor(v, device=params[0].device) for v in schedule(0))
    if kind == "lars":
        return LARS(params, lr, momentum=momentum, weight_decay=0.05, eta=0.02, max_trust=0.3)
    return LAMB(params, lr, momentum=momentum, weight_decay=0.05)


def snapshot(params: list[Any], optimizer: Any) -> Any:
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_equals_a_plain_loop(kind: str) -> None:
    params = parameters()
    start = [p.detach().double() for p in params]
    grads = [[g.double() for g in gradients(params, step)] for step in range(STEPS)]
    by_hand = lars_by_hand if kind == "lars" else lamb_by_hand
    optimizer = build(kind, params)
    for step in range(STEPS):
        set_gradients(params, step)
        set_schedule(optimizer, *schedule(step))
        optimizer.step()
    for i, p in enumerate(params):
        if p.numel():
            want = by_hand(start[i], [g[i] for g in grads])
            limit = TOLERANCE * want.abs().max().item()
            torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=limit)
            assert not torch.equal(p.double(), start[i])


def test_lars_finds_what_is_not_finite_and_divides_by_the_scale() -> None:
    one, other = parameters(), parameters()
    first, second = build("lars", one), build("lars", other)
    second.grad_scale, second.finds_inf = torch.tensor(1024.0), True
    second.found_inf = torch.full((1,), 7.0)
    set_gradients(one, 0)
    for p, grad in zip(other, gradients(other, 0), strict=True):
        p.grad = grad * 1024
    held = [p.grad.clone() for p in other]
    first.step()
    second.step()
    assert second.found_inf.item() == 0
    assert_same(snapshot(one, first), snapshot(other, second))
    assert_same([p.grad for p in other], held)  # divided elsewhere
    before = snapshot(other, second)
    for p, bad in zip(other, itertools.cycle((torch.nan, torch.inf, -torch.inf))):
        if p.numel():
            set_gradients(other, 1)
            p.grad[(-1,) * p.dim()] = bad
            second.step()
            assert second.found_inf.item() == 1
            assert_same(before, snapshot(other, second))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_make_optimizer(name: str) -> None:
    model = nn.Linear(4, 2)
    optimizer: Any = make_optimizer(name, model, lr=1, weight_decay=0.25)
    (group,) = optimizer.param_groups
    set_schedule(optimizer, 0.125, 0.75)
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    assert (float(group["lr"]), float(momentum)) == (0.125, 0.75)
    assert (group["weight_decay"], group.get("nesterov", False)) == (0.25, False)
    assert len(group["params"]) == len(list(model.parameters()))
    assert isinstance(momentum, Tensor) == (name in ("lars", "lamb"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_captured_step_equals_eager_and_the_cpu(kind: str) -> None:
    devices = ("cpu", "cuda", "cuda")
    every = [parameters(device) for device in devices]
    for params in every:
        del params[7]  # with holes, which the kernels refuse
    optimizers = [build(kind, params) for params in every]
    for params, optimizer, device in zip(every, optimizers, devices, strict=True):
        optimizer.found_inf = torch.zeros(1, device=device)
        set_gradients(params, 0)
    graph = torch.cuda.CUDAGraph()
    # No warm-up: the state was allocated with the optimizer, and capture runs nothing.
    with torch.cuda.graph(graph):
        optimizers[2].step()
    for step in range(10):
        for params, optimizer in zip(every, optimizers, strict=True):
            grads = gradients(params, step)
            torch._foreach_copy_([p.grad for p in params], grads)
            set_schedule(optimizer, *schedule(step))
            optimizer.found_inf.fill_(float(step == 4))
        for optimizer in optimizers[:2]:
            optimizer.step()
        graph.replay()
        if step == 6:  # loading writes into the tensors that the graph holds
            optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert_same(snapshot(every[1], optimizers[1]), snapshot(every[2], optimizers[2]))
    for a, b in zip(every[0], every[1], strict=True):
        limit = TOLERANCE * max(a.abs().max().item(), 1e-6) if a.numel() else 0
        torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=0, atol=limit)
