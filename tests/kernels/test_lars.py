"""LARS by its kernels, on a GPU or in Triton's interpreter, against torch's operations."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from infobatch_fast.kernels import lars, select
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train import optim
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import LARS
from infobatch_fast.train.schedule import set_schedule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-5  # relative to a tensor's largest element
# NumPy, in which the interpreter computes, warns where a norm of 0 is divided by one.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = select.load()
    monkeypatch.setattr(optim, "triton_kernels", lambda device: loaded)


def tensors() -> list[Any]:
    """Whole, filled and overfull blocks, memory orders, norms of 0."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    last = torch.channels_last
    made = [
        *(draw(3), draw(4095), draw(4096), draw(4097), draw(2 * 4096 + 5), draw(0, 4), draw()),
        draw(32, 16, 3, 3).to(memory_format=last),
        draw(64, 32, 1, 1).to(memory_format=last),
        torch.zeros(70),  # norm 0: trust 1
        draw(7, 130).t(),
        draw(50) * 1e4,  # little gradient: trust beyond its bound
        draw(129),  # no gradient but 0
    ]
    return [nn.Parameter(t.to(DEVICE)) for t in made]


def set_gradients(params: list[Any], step: int) -> None:
    """Some beyond the clip, some in another memory order than the weight."""
    g = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        factor = {1: 30.0, 11: 1e-4, 12: 0.0}.get(i, 1.0)
        grad = torch.randn(p.shape, generator=g) * factor
        if p.dim() == 4 and step % 2:  # else in C order: copied, where the strides mean anything
            grad = grad.to(memory_format=torch.channels_last)
        p.grad = grad.to(DEVICE)


def build(params: list[Any], fused: bool = True, **options: Any) -> Any:
    lr, momentum = (torch.tensor(v, device=DEVICE) for v in (0.2, 0.85))
    options = {"weight_decay": 0.05, "eta": 0.02, **options}
    return LARS(params, lr, momentum=momentum, fused=fused, **options)


def run_steps(optimizer: Any, params: list[Any], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        set_gradients(params, step)
        set_schedule(optimizer, 0.2 + 0.05 * (step % 7), 0.85 + 0.01 * (step % 10))
        optimizer.step()


def snapshot(params: list[Any], optimizer: Any) -> list[Tensor]:
    momenta = [optimizer.state[p]["momentum_buffer"] for p in params if p.numel()]
    return [tensor.detach().clone() for tensor in (*params, *momenta)]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_near(one: list[Tensor], other: list[Tensor]) -> None:
    for got, want in zip(one, other, strict=True):
        limit = TOLERANCE * max(want.abs().max().item(), 1e-6) if want.numel() else 0
        torch.testing.assert_close(got, want, rtol=0, atol=limit)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.0}, {"max_trust": 0.03, "weight_decay": 0.5}]
)
def test_equals_torchs_operations(options: dict[str, Any]) -> None:
    ours, theirs = tensors(), tensors()
    start = [p.detach().clone() for p in theirs]
    fused, foreach = build(ours, **options), build(theirs, False, **options)
    run_steps(fused, ours, 3)
    run_steps(foreach, theirs, 3)
    assert_near(snapshot(ours, fused), snapshot(theirs, foreach))
    moved = [not torch.equal(p, was) for p, was in zip(ours, start, strict=True) if p.numel()]
    # A gradient of 0 decays the weight alone.
    assert sum(moved) == len(moved) - (options.get("weight_decay") == 0.0)


def test_trust_ratio_is_that_of_float64() -> None:
    g = torch.Generator().manual_seed(5)
    # Seven decades in one tensor: a running sum in float32 would lose the small ones.
    w = torch.randn(100_000, generator=g) * 10 ** (7 * torch.rand(100_000, generator=g) - 7)
    w[0] = 30.0
    grad = torch.randn(100_000, generator=g) * 1e-3 + 1.0
    p = nn.Parameter(w.clone().to(DEVICE))
    optimizer = build([p], weight_decay=0.0, clip=1e9)
    set_schedule(optimizer, 1.0, 0.0)
    p.grad = grad.to(DEVICE)
    optimizer.step()
    trust = 0.02 * w.double().norm() / grad.double().norm()
    want = w.double() - trust * grad.double()
    torch.testing.assert_close(p.detach().double().cpu(), want, rtol=1e-6, atol=1e-9)


def test_rates_of_tensors_of_many_blocks() -> None:
    params = [torch.zeros(n, device=DEVICE) for n in (5, 4096 * 2500 + 1, 4096 * 1024, 4097)]
    step = lars.Lars(params, params)
    counts = [1, 2501, 1024, 2]
    assert step.blocks == sum(counts)
    sums = torch.rand((step.blocks, 2), generator=torch.Generator().manual_seed(2))
    sums[-1] = torch.tensor([0.0, 1e-3])
    sums[-2] = 0.0  # of the last tensor: the parameter is 0
    step.sums.copy_(sums.reshape(-1))
    lr = torch.tensor([0.5], device=DEVICE)
    tables = (step.sums, step.first, step.rates, lr, 0.02, 0.05, 0.9)
    lars.launch(lars._rates_kernel, 4, *tables, PARTIALS=lars.PARTIALS, num_warps=lars.WARPS)
    for part, rate in zip(sums.double().split(counts), step.rates.tolist(), strict=True):
        w, g = part.sum(0).sqrt().tolist()
        trust = 1.0 if w == 0 else 0.02 * w / (g + 0.05 * w)
        assert rate == pytest.approx(0.5 * min(trust, 0.9), rel=2e-7)


def test_what_is_not_finite_is_found_and_skipped() -> None:
    params = [tensors()[i] for i in (0, 2, 3, 7)]
    optimizer = build(params)
    optimizer.finds_inf, optimizer.found_inf = True, torch.full((1,), 7.0, device=DEVICE)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    run_steps(optimizer, params, 1)
    assert optimizer.found_inf.item() == 0
    before = snapshot(params, optimizer)
    for p, bad in zip(params, itertools.cycle((torch.nan, torch.inf, -torch.inf)), strict=False):
        set_gradients(params, 1)
        p.grad[(-1,) * p.dim()] = bad
        optimizer.step()
        assert optimizer.found_inf.item() == 1
        assert_same(before, snapshot(params, optimizer))
    set_gradients(params, 0)
    params[2].grad[:] = 1e25  # finite, though the sum of its squares is not
    optimizer.step()
    assert optimizer.found_inf.item() == 0
    assert not any(torch.equal(p, q) for p, q in zip(params[:2], before, strict=False))


def test_unskipped_nan_reaches_the_parameter_as_with_torch() -> None:
    both = [[tensors()[i] for i in (0, 2, 3)] for _ in range(2)]
    for params, fused in zip(both, (True, False), strict=True):
        set_gradients(params, 0)
        params[1].grad[7] = torch.nan
        build(params, fused).step()
    for a, b in zip(*both, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert both[0][1].isnan().all()


def test_grad_scale_divides_and_leaves_the_gradients() -> None:
    one, other = tensors(), tensors()
    first, second = build(one), build(other)
    second.grad_scale = torch.tensor(1024.0, device=DEVICE)
    set_gradients(one, 0)
    set_gradients(other, 0)
    for p in other:
        p.grad *= 1024
    held = [p.grad.clone() for p in other]
    first.step()
    second.step()
    assert_same(snapshot(one, first), snapshot(other, second))
    assert_same([p.grad for p in other], held)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_saved_state_continues(before: bool, after: bool) -> None:
    params, resumed = ([tensors()[i] for i in (0, 3, 7)] for _ in range(2))
    optimizer, other = build(params, before), build(resumed, after)
    run_steps(optimizer, params, 2)
    run_steps(other, resumed, 1)  # state to be overwritten
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(resumed, params)
    for stepped, theirs in ((optimizer, params), (other, resumed)):
        run_steps(stepped, theirs, 2, start=2)
    same = assert_same if before == after else assert_near
    same(snapshot(resumed, other), snapshot(params, optimizer))


def test_tensors_that_move_or_are_misaligned() -> None:
    ours, theirs = tensors(), tensors()
    fused, foreach = build(ours), build(theirs, False)
    kept = []
    for step in range(3):
        run_steps(fused, ours, 1, step)
        run_steps(foreach, theirs, 1, step)
        # Elsewhere, and not at a multiple of 16 bytes, while what was there before still is.
        for p in ours:
            room = torch.empty(p.numel() + 1, device=DEVICE)[1:]
            kept.append(p.data)
            p.data = room.as_strided(p.shape, p.stride()).copy_(p.data)
    assert_near(snapshot(ours, fused), snapshot(theirs, foreach))


def test_autograd_sees_the_change() -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = build([p])
    p.grad = torch.ones_like(p)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Operations(TorchDispatchMode):
    """Names of torch's operations that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        views = {"view", "reshape", "detach", "unbind", "as_strided", "alias"}
        if name not in views and not name.startswith(("empty", "profiler::")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_launches_of_resnet50(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_model("r50", seed=0).to(DEVICE)
    params = list(model.to(memory_format=torch.channels_last).parameters())
    assert len(params) == 161
    optimizer = build(params)
    launched = []
    monkeypatch.setattr(lars, "launch", lambda kernel, *_, **__: launched.append(kernel))
    optimizer.finds_inf, optimizer.found_inf = True, torch.zeros((), device=DEVICE)
    # A gradient of a 1x1 convolution may have other strides where they mean nothing.
    grads = [p.detach().clone() for p in params]
    for moved in (True, False, True):
        if moved:
            grads = [g.clone() for g in grads]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        launched.clear()
        with Operations() as operations, host_syncs(DEVICE, "forbid"):
            optimizer.step()
        assert launched == [lars._norms_kernel, lars._rates_kernel, lars._update_kernel]
        # torch's multi-tensor operation takes 96 tensors with a number each: two launches.
        assert operations.names == ["zero_", *["zero_", "_foreach_add_"] * moved]


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        *(((), (), True), ((3, 4), (4, 1), True), ((3, 4), (1, 3), True)),
        *(((2, 3, 4, 5), (60, 1, 15, 3), True), ((1, 4, 1), (77, 1, 0), True)),
        *(((3, 4), (8, 2), False), ((3, 4), (0, 1), False), ((3, 2), (1, 1), False)),
        ((4,), (2,), False),
    ],
)
def test_is_dense(shape: Any, strides: Any, dense: bool) -> None:
    assert lars.is_dense(torch.Size(shape), strides) is dense


def test_refused() -> None:
    ones = torch.ones(40, device=DEVICE)
    step = lars.Lars([ones], [ones.clone()])
    one = torch.ones(1, device=DEVICE)
    numbers: dict[str, Any] = {"weight_decay": 0.0, "eta": 0.1, "max_trust": 1.0, "clip": 1.0}
    for name, call in [
        ("params", lambda: lars.Lars([ones.half()], [ones])),
        ("momenta", lambda: lars.Lars([ones], [ones.half()])),
        ("params", lambda: lars.Lars([ones[::2]], [ones[::2]])),
        (r"params\[0\]", lambda: lars.Lars([ones[:5]], [ones[:10:2]])),
        ("scale", lambda: step.measure([ones], ones)),
        ("lr", lambda: step.update(one.double(), one, **numbers)),
        ("momentum", lambda: step.update(one, ones, **numbers)),
        ("found", lambda: step.update(one, one, **numbers, found=one.to("meta"))),
    ]:
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must be|have"):
            call()


@pytest.mark.gpu
def test_captured_steps_equal_eager_ones() -> None:
    """Two batch sizes, each a graph of its own with its own gradients, and eager ones between."""

    def trained(fused: bool, captured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 5)).cuda()
        optimizer = build(list(model.parameters()), fused, weight_decay=1e-3)
        optimizer.finds_inf, optimizer.found_inf = True, torch.zeros((), device="cuda")
        g = torch.Generator().manual_seed(3)
        inputs = [torch.zeros(size, 30, device="cuda") for size in (16, 9)]

        def step(batch: Tensor) -> None:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for batch in inputs:
                model(batch).square().mean().backward()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        graphs = []
        for batch in inputs if captured else ():
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                step(batch)
        waste = []
        for number in range(12):
            which = number % 2
            values = torch.randn(inputs[which].shape, generator=g)
            values[0, 0] = torch.nan if number == 7 else 0.0
            inputs[which].copy_(values)
            set_schedule(optimizer, 0.2 + 0.05 * number, 0.9)
            if captured and number % 5 != 4:
                graphs[which].replay()
            else:
                waste.append(torch.empty(100_000, device="cuda"))  # gradients elsewhere each time
                step(inputs[which])
            assert optimizer.found_inf.item() == (number == 7)
        return snapshot(list(model.parameters()), optimizer)

    eager = trained(True, captured=False)
    assert all(torch.isfinite(p).all() for p in eager)
    assert_near(trained(True, captured=True), eager)
    assert_near(trained(False, captured=False), eager)
