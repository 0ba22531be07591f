"""LARS and LAMB against plain loops, skipped steps, and state."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from infobatch_fast.errors import UserError
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train.optim import LAMB, LARS, OPTIMIZERS, make_optimizer, nonfinite
from infobatch_fast.train.schedule import set_schedule

# Relative to the largest element, after 25 steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}
STEPS = 25

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def parameters(dtype=torch.float32, device="cpu") -> list[Any]:
    """Weights, biases, channels_last convolutions, zeros, a scalar, an empty one, a strided one."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(device, dtype)

    last = torch.channels_last
    tensors = [
        draw(8, 3, 3, 3).to(memory_format=last),
        draw(16, 8, 1, 1).to(memory_format=last),
        draw(16),
        torch.zeros(5, dtype=dtype, device=device),  # Norm 0: trust 1.
        draw(),
        draw(0, 4),
        draw(7, 130).t(),
        draw(6, 10)[:, ::2],  # With holes between its elements.
        draw(4, 9, scale=1e3),  # Little gradient: trust above 50 for LARS with a large eta.
        draw(65),
        draw(1, 1, 1, 1),
    ]
    return [nn.Parameter(t) for t in tensors]


def gradients(params, step):
    """Gradients of one step, some beyond the clip, one all zero, one in another memory order."""
    g = torch.Generator().manual_seed(100 + step)
    grads = []
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        grad = grad * (30.0 if i == 2 else 1e-4 if i == 8 else 1.0)
        grad = torch.zeros_like(grad) if i == 9 else grad
        grads.append(grad.to(p.device, p.dtype))
    return grads


def set_gradients(params, step, scale=1.0):
    for p, grad in zip(params, gradients(params, step), strict=True):
        p.grad = grad * scale


def schedule(step):
    return 0.2 + 0.05 * (step % 7), 0.85 + 0.01 * (step % 10)


def lars_by_hand(w, steps, grads, *, decay, eta, max_trust=50.0, clip=10.0):
    """One tensor in float64; returns it and the largest trust before the clamp."""
    buffer, highest = torch.zeros_like(w), 0.0
    for step in range(steps):
        lr, momentum = schedule(step)
        g = grads[step]
        norm, gradient = w.norm().item(), g.norm().item()
        trust = 1.0
        if norm and gradient:
            trust = eta * norm / (gradient + decay * norm)
            highest = max(highest, trust)
        d = g + decay * w
        d = torch.maximum(torch.minimum(d, torch.tensor(clip)), torch.tensor(-clip))
        buffer = momentum * buffer + d
        w = w - lr * min(max(trust, 0.0), max_trust) * buffer
    return w, highest


def lamb_by_hand(w, steps, grads, *, decay, beta2=0.999, eps=1e-6, max_trust=10.0):
    m, v, highest = torch.zeros_like(w), torch.zeros_like(w), 0.0
    for step in range(steps):
        lr, beta1 = schedule(step)
        g = grads[step]
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        u = m_hat / (v_hat.sqrt() + eps) + decay * w
        norm, update = w.norm().item(), u.norm().item()
        trust = norm / update if norm and update else 1.0
        highest = max(highest, trust)
        w = w - lr * min(trust, max_trust) * u
    return w, highest


def build(kind, params, tensors=False, **kw) -> Any:
    lr, momentum = schedule(0)
    if tensors:
        wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        lr, momentum = (
            torch.tensor(v, dtype=wide, device=params[0].device) for v in (lr, momentum)
        )
    if kind == "lars":
        return LARS(params, lr, momentum=momentum, **{"weight_decay": 0.05, "eta": 0.02, **kw})
    return LAMB(params, lr, betas=(momentum, 0.999), **{"weight_decay": 0.05, **kw})


def run_steps(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(params, step)
        set_schedule(optimizer, *schedule(step))
        optimizer.step()


def snapshot(params, optimizer):
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])


def assert_same(one, other):
    """Bit for bit equal parameters and state."""
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1].keys() == other[1].keys()
    for key, state in one[1].items():
        assert state.keys() == other[1][key].keys()
        assert all(torch.equal(state[name], other[1][key][name]) for name in state)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_equals_a_plain_loop(kind, dtype, tensors):
    if kind == "lamb" and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("its second moment needs more than 16 bits")
    params = parameters(dtype)
    start = [p.detach().clone().double() for p in params]
    grads = [[g.double() for g in gradients(params, step)] for step in range(STEPS)]
    by_hand = lars_by_hand if kind == "lars" else lamb_by_hand
    options = {"eta": 0.02} if kind == "lars" else {}
    run_steps(build(kind, params, tensors), params, STEPS)
    highest = []
    for i, p in enumerate(params):
        want, trust = by_hand(start[i], STEPS, [g[i] for g in grads], decay=0.05, **options)
        highest.append(trust)
        limit = TOLERANCE[dtype] * max(want.abs().max().item(), 1e-6) if p.numel() else 0
        torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=limit)
        if p.numel() and dtype in (torch.float32, torch.float64):
            assert not torch.equal(p.double(), start[i])
    if kind == "lamb":
        assert max(highest) > 10  # The clamp was active.


def test_lars_clamps_trust_and_gradient():
    w = torch.tensor([3e4, 4e4])
    small, large = nn.Parameter(w.clone()), nn.Parameter(torch.ones(2))
    optimizer = LARS([small, large], 0.5, momentum=0.0, weight_decay=0.0, eta=0.01)
    small.grad, large.grad = torch.tensor([0.6, 0.8]), torch.tensor([30.0, -40.0])
    optimizer.step()
    # trust = 0.01 * 5e4 / 1 = 500, held at 50; and 0.01 * sqrt 2 / 50 of the raw gradient.
    torch.testing.assert_close(small.detach(), w - 0.5 * 50 * torch.tensor([0.6, 0.8]))
    trust = 0.01 * 2**0.5 / 50
    torch.testing.assert_close(large.detach(), 1 - 0.5 * trust * torch.tensor([10.0, -10.0]))


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_tensor_and_float_hyperparameters_agree(kind):
    one, other = parameters(), parameters()
    first, second = build(kind, one, tensors=False), build(kind, other, tensors=True)
    held = [v for v in second.param_groups[0].values() if isinstance(v, torch.Tensor)]
    held += [b for b in second.param_groups[0].get("betas", ()) if isinstance(b, torch.Tensor)]
    run_steps(first, one, STEPS)
    run_steps(second, other, STEPS)
    assert_same(snapshot(one, first), snapshot(other, second))
    assert len(held) == 2
    want = torch.tensor(schedule(STEPS - 1))
    assert torch.equal(torch.stack(held), want)  # Filled in place, and not gated in place.


def small_model() -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_step_changes_nothing(name, first, shape):
    def trained(skip):
        model = small_model()
        params = list(model.parameters())
        optimizer: Any = make_optimizer(name, model, lr=0.1, weight_decay=0.01)
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(shape), None
        if not first:
            run_steps(optimizer, params, 3)
        for bad in (float("nan"), float("inf")) if skip else ():
            before = snapshot(params, optimizer)
            for p in params:
                p.grad = torch.full_like(p, bad)
            optimizer.found_inf = torch.ones(shape)
            optimizer.step()
            after = snapshot(params, optimizer)
            if name == "adam" and first and not before[1]:
                assert all(not v.any() for s in after[1].values() for v in s.values())
                after = (after[0], {})
            assert_same(before, after)
        optimizer.found_inf = torch.zeros(shape)
        run_steps(optimizer, params, 4, start=3)
        return snapshot(params, optimizer)

    result = trained(skip=True)
    assert all(torch.isfinite(p).all() for p in result[0])
    assert_same(result, trained(skip=False))


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_gated_step_that_is_not_skipped_is_the_plain_one(kind):
    one, other = parameters(), parameters()
    first, second = build(kind, one), build(kind, other)
    second.found_inf = torch.zeros(())
    run_steps(first, one, 5)
    run_steps(second, other, 5)
    assert_same(snapshot(one, first), snapshot(other, second))


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_grad_scale_divides_and_leaves_the_gradients(kind):
    one, other = parameters(), parameters()
    first, second = build(kind, one), build(kind, other)
    second.grad_scale, second.found_inf = torch.tensor(1024.0), torch.zeros(())
    set_gradients(one, 0)
    set_gradients(other, 0, scale=1024.0)
    held = [p.grad.clone() for p in other]
    first.step()
    second.step()
    assert_same(snapshot(one, first), snapshot(other, second))
    assert all(torch.equal(p.grad, g) for p, g in zip(other, held, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler_drives_the_step(name):
    model, plain = small_model(), small_model()
    params = list(model.parameters())
    optimizer = make_optimizer(name, model, lr=0.1, weight_decay=0.01)
    other = make_optimizer(name, plain, lr=0.1, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for step in range(4):
        set_gradients(params, step, scale=scaler.get_scale() if step != 1 else float("inf"))
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            set_gradients(list(plain.parameters()), step)
            other.step()
    assert scaler.get_scale() == 512.0
    assert_same(snapshot(params, optimizer), snapshot(list(plain.parameters()), other))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_continues_bit_for_bit(name):
    model = small_model()
    params = list(model.parameters())
    optimizer: Any = make_optimizer(name, model, lr=0.1, weight_decay=0.01)
    run_steps(optimizer, params, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run_steps(optimizer, params, 5, start=5)

    resumed = small_model()
    other = make_optimizer(name, resumed, lr=0.7, weight_decay=0.01)
    run_steps(other, list(resumed.parameters()), 2)  # State to be overwritten.
    held = dict(other.state)
    tensors = {p: dict(s) for p, s in held.items()}
    rate = other.param_groups[0]["lr"]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    if name in ("lars", "lamb"):
        assert all(other.state[p][k] is t for p, s in tensors.items() for k, t in s.items())
        assert other.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(schedule(4)[0])
    run_steps(other, list(resumed.parameters()), 5, start=5)
    assert_same(snapshot(params, optimizer), snapshot(list(resumed.parameters()), other))


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_loading_is_a_copy_clears_and_checks(kind):
    one, other = parameters(), parameters()
    first, second = build(kind, one), build(kind, other)
    run_steps(first, one, 3)
    second.load_state_dict(first.state_dict())
    before = snapshot(one, first)
    run_steps(second, other, 3)
    assert_same(before, snapshot(one, first))
    fresh = snapshot(one, build(kind, parameters()))[1]
    empty = {**second.state_dict(), "state": {}}
    second.load_state_dict(empty)
    assert_same(([], fresh), ([], second.state_dict()["state"]))

    slot = "momentum_buffer" if kind == "lars" else "exp_avg"
    wrong = copy.deepcopy(first.state_dict())
    wrong["state"][2][slot] = torch.zeros(3)
    before = snapshot(other, second)
    with pytest.raises(ValueError, match=rf"{slot} must have shape \(16,\), got \(3,\)"):
        second.load_state_dict(wrong)
    assert_same(before, snapshot(other, second))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_copies_continue_alike_and_apart(kind, way):
    params = parameters()
    optimizer = build(kind, params, tensors=True)
    run_steps(optimizer, params, 3)
    pair = params, optimizer
    copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    run_steps(optimizer, params, 3, start=3)
    run_steps(copied[1], copied[0], 3, start=3)
    assert_same(snapshot(params, optimizer), snapshot(*copied))
    before = snapshot(params, optimizer)
    run_steps(copied[1], copied[0], 1)
    assert_same(before, snapshot(params, optimizer))


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_parameter_without_a_gradient_is_left_out(kind):
    params = parameters()
    optimizer = build(kind, params)
    alone: Any = [parameters()[6]]
    single = build(kind, alone)
    before: Any = None
    for step in range(8):
        set_gradients(params, step)
        grad: Any = params[6].grad
        if step % 3 == 1:
            before = snapshot([params[6]], optimizer)
            params[6].grad = None
        else:
            alone[0].grad = grad.clone()
            single.step()
        optimizer.step()
        if step % 3 == 1:
            after = snapshot([params[6]], optimizer)
            assert torch.equal(before[0][0], after[0][0])
            assert all(torch.equal(v, after[1][6][k]) for k, v in before[1][6].items())
    torch.testing.assert_close(params[6].detach(), alone[0].detach(), rtol=1e-6, atol=1e-7)
    for p in params:
        p.grad = None
    before = snapshot(params, optimizer)
    optimizer.step()
    assert_same(before, snapshot(params, optimizer))


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_memory_format_changed_after_the_optimizer_was_made(kind):
    one, other = parameters(), parameters()
    first, second = build(kind, one), build(kind, other)
    run_steps(first, one, 3)
    run_steps(second, other, 3)
    for p in other:
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    run_steps(first, one, 3, start=3)
    run_steps(second, other, 3, start=3)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_state_has_the_strides_of_its_parameter(kind):
    params = parameters()
    optimizer = build(kind, params)
    held = [p for p in params if p.numel()]
    assert held[0].is_contiguous(memory_format=torch.channels_last)
    for p in held:
        for slot, value in optimizer.state[p].items():
            # empty_like closes the holes of a strided parameter.
            assert value.stride() == (() if slot == "step" else torch.empty_like(p).stride())


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_groups_dtypes_and_closure(kind):
    params = parameters()
    wide = parameters(torch.float64)
    both = build(kind, [{"params": params[:5] + wide}, {"params": params[5:], "lr": 0.0}])
    apart, more = parameters(), parameters(torch.float64)
    first, second = build(kind, apart[:5]), build(kind, more)
    for p in (params, wide, apart, more):
        set_gradients(p, 0)
    assert both.step(lambda: torch.is_grad_enabled()) is True
    first.step()
    second.step()
    left = params[:5] + wide
    assert all(torch.equal(a, b) for a, b in zip(left, apart[:5] + more, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(params[5:], parameters()[5:], strict=True))


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_step_waits_for_no_device(kind, tensors):
    params = parameters()
    optimizer = build(kind, params, tensors)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(1), torch.ones(1)
    set_gradients(params, 0)
    grads = [p.grad for p in params]
    with host_syncs(torch.device("cpu"), "forbid"):
        for _ in range(2):
            nonfinite(grads, optimizer.found_inf, optimizer.grad_scale)
            set_schedule(optimizer, 0.1, 0.9)
            optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, r"lr must be >= 0, got -1"),
        ({"lr": float("nan")}, r"lr must be >= 0, got nan"),
        ({"lr": torch.zeros(2)}, r"lr must be a number or a 0-dim tensor, got 1-dim"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be >= 0, got -0.1"),
        ({"eta": -1.0}, r"eta must be >= 0, got -1.0"),
        ({"max_trust": -1.0}, r"max_trust must be >= 0, got -1.0"),
        ({"clip": -1.0}, r"clip must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.5)}, r"betas\[1\] must be in \[0, 1\), got 1.5"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, r"eps must be > 0, got 0.0"),
    ],
)
def test_numbers_out_of_range(options, message):
    kind = LAMB if options.keys() & {"betas", "eps"} else LARS
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


def test_parameters_and_gradients_that_cannot_work():
    whole = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be dense and floating point, got torch\.int64"):
        LARS([nn.Parameter(whole, requires_grad=False)], 0.1)
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = LARS(table.parameters(), 0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradients must be dense, got torch\.sparse_coo"):
        optimizer.step()


def test_make_optimizer():
    model = small_model()
    for name in OPTIMIZERS:
        optimizer: Any = make_optimizer(name, model, lr=1, weight_decay=0.25, momentum=0.5)
        (group,) = optimizer.param_groups
        set_schedule(optimizer, 0.125, 0.75)
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        assert (float(group["lr"]), float(momentum)) == (0.125, 0.75)
        assert group["weight_decay"] == 0.25
        assert len(group["params"]) == len(list(model.parameters()))
        assert isinstance(momentum, torch.Tensor) == (name in ("lars", "lamb"))
    assert not make_optimizer("sgd", model, lr=1, weight_decay=0).param_groups[0]["nesterov"]
    message = r"optimizer must be one of sgd, adam, lars, lamb, got larss \(did you mean lars\?\)"
    with pytest.raises(UserError, match=message):
        make_optimizer("larss", model, lr=0.1, weight_decay=0.0)
    for name in OPTIMIZERS:
        with pytest.raises(ValueError, match=r"lr must be >= 0, got -1"):
            make_optimizer(name, model, lr=-1, weight_decay=0.0)
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
            make_optimizer(name, model, lr=1, weight_decay=0.0, momentum=1.0)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_nonfinite(shape):
    def tensors():
        return [p.detach().clone() for dtype in TOLERANCE for p in parameters(dtype)]

    found, half = torch.full(shape, 7.0), torch.full(shape, 0.5)
    grads, start = tensors(), tensors()
    nonfinite(grads, found, half)
    assert torch.equal(found, torch.zeros(shape))
    assert all(torch.equal(g, b * 0.5) for g, b in zip(grads, start, strict=True))
    bad = itertools.cycle((float("nan"), float("inf"), float("-inf")))
    for i in range(len(grads)):
        grads = tensors()
        if grads[i].numel():
            grads[i][(-1,) * grads[i].dim()] = next(bad)
            nonfinite(grads, found, half)
            assert torch.equal(found, torch.ones(shape)), i
    nonfinite([], found, half)
    assert torch.equal(found, torch.zeros(shape))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_cuda_equals_cpu_and_never_syncs(kind, dtype):
    ours, theirs = parameters(dtype), parameters(dtype, "cuda")
    first, second = build(kind, ours), build(kind, theirs, tensors=True)
    second.found_inf, second.grad_scale = torch.zeros((), device="cuda"), None
    for step in range(STEPS):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for optimizer in (first, second):
            set_schedule(optimizer, *schedule(step))
        first.step()
        torch.cuda.synchronize()
        with host_syncs(torch.device("cuda"), "forbid"):
            second.step()
    for a, b in zip(ours, theirs, strict=True):
        limit = TOLERANCE[dtype] * max(a.abs().max().item(), 1e-6) if a.numel() else 0
        torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=0, atol=limit)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cuda_skips_like_the_cpu(name):
    model = small_model().cuda()
    params = list(model.parameters())
    optimizer: Any = make_optimizer(name, model, lr=0.1, weight_decay=0.01)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(1, device="cuda"), None
    run_steps(optimizer, params, 3)
    before = snapshot(params, optimizer)
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(1, device="cuda")
    optimizer.step()
    assert_same(before, snapshot(params, optimizer))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_captured_step_equals_eager(kind):
    eager, captured = parameters(device="cuda"), parameters(device="cuda")
    first, second = build(kind, eager, tensors=True), build(kind, captured, tensors=True)
    for optimizer in (first, second):
        optimizer.found_inf = torch.zeros(1, device="cuda")
    set_gradients(captured, 0)
    graph = torch.cuda.CUDAGraph()
    # No warm-up: the state was allocated with the optimizer, and capture runs nothing.
    with torch.cuda.graph(graph):
        second.step()
    for step in range(10):
        set_gradients(eager, step)
        torch._foreach_copy_([p.grad for p in captured], [p.grad for p in eager])
        for optimizer in (first, second):
            set_schedule(optimizer, *schedule(step))
            optimizer.found_inf.fill_(float(step == 4))
        first.step()
        graph.replay()
        if step == 6:
            # Loading writes into the tensors that the graph holds.
            second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(snapshot(eager, first), snapshot(captured, second))
