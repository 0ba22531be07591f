"""The Triton kernels of LARS and LAMB against torch's multi-tensor operations.

Without a GPU they run in Triton's interpreter, which has to be chosen before Triton is imported:
in a process of their own.
"""

import copy
import importlib
import io
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train import layerwise
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import LAMB, LARS
from infobatch_fast.train.schedule import set_schedule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KINDS = ("lars", "lamb")
STEPS = 22
TOLERANCE = 1e-5  # relative to a tensor's largest element, after STEPS steps in float32

kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="run by test_in_the_interpreter"
)
# numpy, in which the interpreter computes, warns where a norm of 0 is divided by one.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def module() -> Any:
    return importlib.import_module("infobatch_fast.kernels.layerwise")


@pytest.mark.skipif(INTERPRETED, reason="it is this process")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    hidden = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def tensors(seed=1, few=False) -> list[Any]:
    """Whole, filled and overfull blocks, memory orders, norms of 0, and what the kernels refuse."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    last = torch.channels_last
    made = [
        draw(1),
        draw(3),
        draw(4095),
        draw(4096),
        draw(4097),
        draw(3 * 4096 + 5),
        draw(32, 16, 3, 3).to(memory_format=last),
        draw(64, 32, 1, 1).to(memory_format=last),
        torch.zeros(70),  # Norm 0: trust 1.
        draw(),
        draw(7, 130).t(),
        draw(50) * 1e4,  # Little gradient: trust beyond its clamp.
        draw(129),  # No gradient but 0.
        draw(0, 4),
        draw(6, 10)[:, ::2],  # With holes: torch's operations.
        draw(33).double(),  # torch's operations.
    ]
    if few:  # A program takes the interpreter some 8 ms.
        made = [made[i] for i in (1, 3, 4, 7, 8, 14, 15)]
    return [nn.Parameter(t.to(DEVICE)) for t in made]


REFUSED = 2  # of `tensors`, the last


def gradients(params, step) -> list[Tensor]:
    """Gradients of a step, some beyond the clip, some in another memory order than the weight."""
    g = torch.Generator().manual_seed(100 + step)
    grads = []
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g) * (30.0 if i == 2 else 1e-4 if i == 11 else 1.0)
        grad = torch.zeros_like(grad) if i == 12 else grad
        grad = grad.to(p.device, p.dtype)
        if p.dim() == 4 and step % 2:  # Else in C order: copied, where the strides mean anything.
            grad = grad.to(memory_format=torch.channels_last)
        grads.append(grad)
    return grads


def set_gradients(params, step, scale=1.0):
    for p, grad in zip(params, gradients(params, step), strict=True):
        p.grad = grad * scale


def schedule(step):
    return 0.2 + 0.05 * (step % 7), 0.85 + 0.01 * (step % 10)


def build(kind, params, fused: bool | None = True, numbers=False, **options) -> Any:
    lr, momentum = schedule(0)
    if not numbers:
        lr, momentum = (torch.tensor(v, device=DEVICE) for v in (lr, momentum))
    if kind == "lars":
        options = {"weight_decay": 0.05, "eta": 0.02, "momentum": momentum, **options}
        return LARS(params, lr, fused=fused, **options)
    options = {"weight_decay": 0.05, "betas": (momentum, 0.999), **options}
    return LAMB(params, lr, fused=fused, **options)


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


def assert_near(one, other, tolerance=TOLERANCE):
    pairs = [*zip(one[0], other[0], strict=True)]
    for key, state in one[1].items():
        pairs += [(value, other[1][key][name]) for name, value in state.items()]
    for got, want in pairs:
        limit = tolerance * max(want.abs().max().item(), 1e-6) if want.numel() else 0
        torch.testing.assert_close(got, want, rtol=0, atol=limit)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.0, "numbers": True},
    {"max_trust": 0.03, "weight_decay": 0.5},
]


@kernels
@quiet
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "no decay, numbers", "small trust"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs_operations(kind, options):
    ours, theirs = tensors(), tensors()
    start = [p.detach().clone() for p in theirs]
    fused, foreach = build(kind, ours, **options), build(kind, theirs, False, **options)
    assert fused.note == "parameters that are not dense; parameters of torch.float64"
    assert foreach.note == "fused is False"
    run_steps(fused, ours, STEPS if not options else 6)
    run_steps(foreach, theirs, STEPS if not options else 6)
    assert_near(snapshot(ours, fused), snapshot(theirs, foreach))
    moved = [not torch.equal(p, was) for p, was in zip(ours, start, strict=True) if p.numel()]
    # A gradient of 0 decays the weight alone.
    assert sum(moved) >= len(moved) - (options.get("weight_decay") == 0.0)


@kernels
@quiet
@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_other_momenta(kind, momentum):
    # 0.3 as beta1 interpolates from the other end; 0 takes the gradient as it is.
    options = {"momentum": momentum} if kind == "lars" else {"betas": (momentum, 0.9), "eps": 1e-3}
    ours, theirs = tensors(), tensors()
    fused = build(kind, ours, numbers=True, **options)
    foreach = build(kind, theirs, False, numbers=True, **options)
    for step in range(4):
        for params, optimizer in ((ours, fused), (theirs, foreach)):
            set_gradients(params, step)
            optimizer.step()
    assert_near(snapshot(ours, fused), snapshot(theirs, foreach))


@kernels
@quiet
def test_trust_ratios_are_those_of_float64():
    g = torch.Generator().manual_seed(5)
    # Seven decades in one tensor: a running sum in float32 would lose the small ones.
    w = torch.randn(300_000, generator=g) * 10 ** (7 * torch.rand(300_000, generator=g) - 7)
    w[0] = 30.0
    grad = torch.randn(300_000, generator=g) * 1e-3 + 1.0
    p = nn.Parameter(w.clone().to(DEVICE))
    optimizer = build("lars", [p], momentum=0.0, weight_decay=0.0, clip=1e9)
    set_schedule(optimizer, 1.0, 0.0)
    p.grad = grad.to(DEVICE)
    optimizer.step()
    trust = 0.02 * w.double().norm() / grad.double().norm()
    (bucket,) = optimizer._buckets[0][1]
    assert bucket.blocks.rates.item() == pytest.approx(trust.item(), rel=3e-7)
    want = w.double() - trust * grad.double()
    torch.testing.assert_close(p.detach().double().cpu(), want, rtol=1e-6, atol=1e-9)


@kernels
@quiet
@pytest.mark.parametrize("adam", [False, True])
def test_rates_of_tensors_of_many_blocks(adam):
    layer = module()
    params = [torch.zeros(n, device=DEVICE) for n in (5, 4096 * 2500 + 1, 4096 * 1024, 4097)]
    blocks = layer.Blocks(params, [0, 16, 4096 * 2501 + 16, 4096 * 3526 + 16])
    counts = [1, 2501, 1024, 2]
    assert len(blocks) == sum(counts)
    g = torch.Generator().manual_seed(2)
    sums = torch.rand((len(blocks), 2), generator=g)
    sums[-1] = torch.tensor([0.0, 1e-3])
    sums[-2] = 0.0  # Of the last tensor: the parameter is 0.
    blocks.sums.copy_(sums.reshape(-1))
    lr = torch.tensor([0.5], device=DEVICE)
    numbers = (0.02, 0.05, 0.9) if not adam else (0.0, 0.0, 0.9)
    tables = blocks.sums, blocks.first, blocks.rates, lr
    layer._launch(layer._rates_kernel, 4, *tables, *numbers, ADAM=adam, PARTIALS=layer.PARTIALS)
    for part, rate in zip(sums.double().split(counts), blocks.rates.tolist(), strict=True):
        w, u = part.sum(0).sqrt().tolist()
        trust = 1.0 if w == 0 else w / u if adam else 0.02 * w / (u + 0.05 * w)
        assert rate == pytest.approx(0.5 * min(trust, 0.9), rel=2e-7)


@kernels
@quiet
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_step_changes_nothing(kind, first):
    def trained(skip):
        params = tensors(few=True)
        optimizer = build(kind, params)
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        if not first:
            run_steps(optimizer, params, 2)
        for bad in (float("nan"), float("inf"), 1.0) if skip else ():
            before = snapshot(params, optimizer)
            for p in params:
                p.grad = torch.full_like(p, bad)
            optimizer.found_inf = torch.full((1,), 1.0 if bad == 1 else bad, device=DEVICE)
            optimizer.step()
            assert_same(before, snapshot(params, optimizer))
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        run_steps(optimizer, params, 2, start=2)
        return snapshot(params, optimizer)

    result = trained(skip=True)
    assert all(torch.isfinite(p).all() for p in result[0])
    assert_same(result, trained(skip=False))


@kernels
@quiet
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_finds_what_is_not_finite(kind, fused):
    params = tensors(few=True)
    optimizer = build(kind, params, fused)
    optimizer.finds_inf, optimizer.found_inf = True, torch.full((1,), 7.0, device=DEVICE)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    run_steps(optimizer, params, 1)
    assert optimizer.found_inf.item() == 0
    before = snapshot(params, optimizer)
    bad = [float("nan"), float("inf"), float("-inf")]
    # One element of one tensor, the last: also of those that torch's operations take.
    for i, p in enumerate(params):
        if not p.numel():
            continue
        set_gradients(params, i)
        p.grad[(-1,) * p.dim()] = bad[i % 3]
        before = snapshot(params, optimizer)
        optimizer.step()
        assert optimizer.found_inf.item() == 1, i
        assert_same(before, snapshot(params, optimizer))
    set_gradients(params, 0)
    params[2].grad[:] = 1e25  # Finite, though the sum of its squares is not.
    optimizer.step()
    assert optimizer.found_inf.item() == 0
    assert not any(torch.equal(p, q) for p, q in zip(params[:2], before[0], strict=False))
    optimizer.found_inf = None
    with pytest.raises(ValueError, match=r"^found_inf must be a tensor .* is set, got None$"):
        optimizer.step()


@kernels
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_unskipped_nan_reaches_the_parameter_as_with_torch(kind):
    ours, theirs = tensors(few=True), tensors(few=True)
    fused, foreach = build(kind, ours), build(kind, theirs, False)
    for params, optimizer in ((ours, fused), (theirs, foreach)):
        set_gradients(params, 0)
        params[1].grad[7] = float("nan")
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert ours[1].isnan().all()


@kernels
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_grad_scale_divides_and_leaves_the_gradients(kind):
    one, other = tensors(few=True), tensors(few=True)
    first, second = build(kind, one), build(kind, other)
    second.grad_scale = torch.tensor(1024.0, device=DEVICE)
    set_gradients(one, 0)
    set_gradients(other, 0, scale=1024.0)
    held = [p.grad.clone() for p in other]
    first.step()
    second.step()
    assert_same(snapshot(one, first), snapshot(other, second))
    assert all(torch.equal(p.grad, g) for p, g in zip(other, held, strict=True))


@kernels
@quiet
@pytest.mark.parametrize("after", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("before", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_state_continues(kind, before, after):
    params = tensors(few=True)
    optimizer = build(kind, params, before)
    run_steps(optimizer, params, 2)
    file = io.BytesIO()
    torch.save(([p.detach() for p in params], optimizer.state_dict()), file)
    run_steps(optimizer, params, 2, start=2)

    resumed = tensors(seed=2, few=True)
    other = build(kind, resumed, after)
    run_steps(other, resumed, 1)  # State to be overwritten, in the tensors that are there.
    held = {p: dict(state) for p, state in other.state.items()}
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, weight in zip(resumed, weights, strict=True):
            p.copy_(weight)
    other.load_state_dict(state)
    assert all(other.state[p][k] is t for p, slots in held.items() for k, t in slots.items())
    run_steps(other, resumed, 2, start=2)
    same = assert_same if before == after else assert_near
    same(snapshot(resumed, other), snapshot(params, optimizer))


@kernels
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_copies_continue_alike(kind):
    params = tensors(few=True)[:-REFUSED]  # A copy has no holes: the kernels would take it.
    optimizer = build(kind, params)
    run_steps(optimizer, params, 1)
    theirs, other = copy.deepcopy((params, optimizer))
    assert other.fused is True
    run_steps(optimizer, params, 1, start=1)
    run_steps(other, theirs, 1, start=1)
    assert_same(snapshot(params, optimizer), snapshot(theirs, other))


@kernels
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_move_or_are_misaligned(kind):
    ours, theirs = tensors()[:7], tensors()[:7]
    fused, foreach = build(kind, ours), build(kind, theirs, False)
    kept = []
    for step in range(4):
        for params, optimizer in ((ours, fused), (theirs, foreach)):
            set_gradients(params, step)
            optimizer.step()
        # Elsewhere, and not at a multiple of 16 bytes, while what was there before still is.
        p = ours[4]
        kept.append(p.data)
        p.data = torch.cat([torch.full((1 + step,), 9.0, device=DEVICE), p.data])[1 + step :]
        assert p.data_ptr() % 16 or step == 3
        pointers = fused._buckets[0][1][0].blocks.point(ours, gradients(ours, step))
        assert pointers.aligned == (step == 3)
    assert_near(snapshot(ours, fused), snapshot(theirs, foreach))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(kept))


@kernels
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_that_is_negated_only_when_read(kind):
    ours, theirs = tensors()[:5], tensors()[:5]
    for params in (ours, theirs):
        set_gradients(params, 0)
    for p in ours:
        p.grad = torch._neg_view(-p.grad)
        assert p.grad.is_neg()
    one, other = build(kind, ours), build(kind, theirs)
    one.step()
    other.step()
    assert_same(snapshot(ours, one), snapshot(theirs, other))


@kernels
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_without_a_gradient_is_left_out(kind):
    params, alone = tensors(), tensors()[5:6]
    optimizer, single = build(kind, params), build(kind, alone)
    for step in range(3):
        set_gradients(params, step)
        was = params[5].detach().clone()
        if step == 1:
            params[5].grad = None
        else:
            alone[0].grad = gradients(params, step)[5]
            single.step()
        optimizer.step()
        assert torch.equal(params[5], was) == (step == 1)
    assert_near(([params[5].detach()], {}), ([alone[0].detach()], {}))


@kernels
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_autograd_sees_the_change(kind):
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = build(kind, [p])
    p.grad = torch.ones_like(p)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Operations(TorchDispatchMode):
    """Names of torch's operations that launch something."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = {"view", "reshape", "detach", "unbind", "as_strided", "alias", "_reshape_alias"}
        name = func._schema.name.removeprefix("aten::")
        if name not in views and not name.startswith(("empty", "profiler::")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@kernels
@pytest.mark.parametrize("finds", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_launches_of_resnet50(kind, finds, monkeypatch):
    model = make_model("r50", seed=0).to(DEVICE).to(memory_format=torch.channels_last)
    params = list(model.parameters())
    assert len(params) == 161
    launched = []

    def launch(kernel, programs, *arguments, **constants):
        assert len(arguments) + len(constants) == len(kernel.arg_names)
        launched.append(programs)

    optimizer = build(kind, params)
    monkeypatch.setattr(module(), "_launch", launch)
    assert optimizer.note == ""
    (bucket,) = optimizer._buckets[0][1]
    assert (
        bucket.blocks.first[-1] == len(bucket.blocks) == sum(-(-p.numel() // 4096) for p in params)
    )
    optimizer.finds_inf, optimizer.found_inf = finds, torch.zeros((), device=DEVICE)
    assert len(bucket.blocks) * 4096 < 1.03 * sum(p.numel() for p in params)
    # A gradient of a 1x1 convolution may have other strides where they mean nothing.
    grads = [p.detach().clone() for p in params]
    ours = 3 if kind == "lars" else 4 + finds
    for moved in (True, False, True):
        if moved:
            grads = [g.clone() for g in grads]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        launched.clear()
        with Operations() as operations, host_syncs(torch.device(DEVICE), "forbid"):
            optimizer.step()
        assert len(launched) == ours
        table = ["zero_", "_foreach_add_"] if moved else []
        assert operations.names == ["zero_"] * finds + table
        # torch's multi-tensor kernel takes 96 tensors with a number each: two launches.
        assert len(launched) + len(operations.names) + 1 <= 20


@kernels
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_that_differ_are_not_taken(kind, monkeypatch):
    real = module()._launch

    def wrong(kernel, programs, *arguments, **constants):
        for _ in range(2):  # an update made twice
            real(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(module(), "_launch", wrong)
    with pytest.raises(RuntimeError, match=r"^they differ from torch's operations$"):
        build(kind, [torch.nn.Parameter(torch.ones(5, device=DEVICE))])


@kernels
def test_what_cannot_run_is_noted(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("Failed to find a\n C compiler")

    if DEVICE == "cpu":
        assert build("lars", tensors(), None).note == "parameters on cpu"
    monkeypatch.setattr(layerwise, "_obstacle", lambda p, fused: "")
    monkeypatch.setattr(module(), "norms", fail)
    params = tensors()[:3]
    optimizer = build("lars", params, None)
    assert optimizer.note == "the kernels cannot run: Failed to find a C compiler"
    theirs = tensors()[:3]
    foreach = build("lars", theirs, False)
    run_steps(optimizer, params, 2)
    run_steps(foreach, theirs, 2)
    assert_same(snapshot(params, optimizer), snapshot(theirs, foreach))
    with pytest.raises(RuntimeError, match="C compiler"):
        build("lars", tensors()[:3], True)


def test_note_on_the_cpu():
    optimizer = LARS([nn.Parameter(torch.ones(3))], 0.1)
    assert optimizer.note == "parameters on cpu"
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer.note == "parameters on cpu"


def test_fused_off_the_gpu_needs_the_interpreter():
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=r"^params must be on a CUDA device .*, got cpu$"):
        LARS([nn.Parameter(torch.ones(3))], 0.1, fused=True)


@kernels
@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ((), (), True),
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), True),
        ((2, 3, 4, 5), (60, 1, 15, 3), True),
        ((1, 4, 1), (77, 1, 0), True),
        ((3, 4), (8, 2), False),
        ((3, 4), (0, 1), False),
        ((3, 2), (1, 1), False),
        ((4,), (2,), False),
    ],
)
def test_is_dense(shape, strides, dense):
    assert module().is_dense(torch.Size(shape), strides) is dense


@kernels
def test_refusals():
    layer, ones = module(), torch.ones(40, device=DEVICE)
    whole = layer.Blocks([ones, ones[:3]], [0, 48])
    pointers = whole.point([ones, ones[:3]], [ones, ones[:3]])
    one, buffer = torch.ones(1, device=DEVICE), torch.zeros(64, device=DEVICE)
    numbers = {"weight_decay": 0.0, "eta": 0.1, "max_trust": 1.0, "clip": 1.0}

    def lars(buffer: Any = buffer, lr: Any = one, momentum: Any = one, **options: Any):
        layer.lars(whole, pointers, buffer, lr, momentum, **numbers, **options)

    half = ones.half()
    for call, kind, message in [
        (lambda: layer.Blocks([half], [0]), TypeError, r"params must be float32, got torch\.f"),
        (lambda: layer.Blocks([ones[::2]], [0]), ValueError, r"dense and not .* strides \(2,\)"),
        (lambda: layer.Blocks([ones[:0]], [0]), ValueError, r"dense and not empty, got shape \(0"),
        (lambda: layer.Blocks([ones], [8]), ValueError, r"starts must be multiples of 16, got \[8"),
        (lambda: layer.Blocks([ones], []), ValueError, r"starts must be one a tensor, got 0 of 1"),
        (lambda: whole.point([ones], [ones]), ValueError, r"must be 2 each, got 1 and 1"),
        (
            lambda: whole.point([ones, ones[:3]], [ones, ones[:1]]),
            ValueError,
            r"grads\[1\] must have shape \(3,\), got \(1,\)",
        ),
        (
            lambda: whole.point([ones, ones[:6:2]], [ones, ones[:3]]),
            ValueError,
            r"params\[1\] must be \(3,\), \(1,\), got \(3,\), \(2,\)",
        ),
        (lambda: lars(lr=0.1), TypeError, r"lr must be a float32 tensor, got 0\.1"),
        (
            lambda: lars(momentum=half[:1]),
            TypeError,
            r"momentum must be a float32 .* torch\.float16",
        ),
        (lambda: lars(found_inf=ones), ValueError, r"found_inf must be one element .* got 40 on"),
        (lambda: lars(buffer[:50]), ValueError, r"buffer must be a vector of at least 51 elements"),
        (lambda: lars(buffer.double()), TypeError, r"buffer must be float32, got torch\.float64"),
        (lambda: layer.find_nonfinite(whole, pointers, None), TypeError, r"found_inf must be a"),
    ]:
        with pytest.raises(kind, match=message):
            call()


AHEAD_OF_TIME = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from infobatch_fast.kernels import layerwise as l

types = {
    **dict.fromkeys("params grads sizes starts".split(), "*i64"),
    **dict.fromkeys("owner number first".split(), "*i32"),
    **dict.fromkeys("eta decay max_trust clip beta2 gain eps".split(), "fp32"),
    "tensors": "i32",
}
sizes = {"BLOCK": l.BLOCK, "UNIT": l.UNIT, "PARTIALS": l.PARTIALS, "COUNTS": l.COUNTS}
for kernel, flag in [
    (l._norms_kernel, "ALIGNED"),
    (l._find_kernel, "ALIGNED"),
    (l._rates_kernel, "ADAM"),
    (l._lars_kernel, "ALIGNED"),
    (l._counts_kernel, None),
    (l._moments_kernel, "ALIGNED"),
    (l._lamb_kernel, "ALIGNED"),
]:
    for value in (True, False) if flag else (None,):
        names = kernel.arg_names
        constants = {**sizes, flag: value}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names
        }
        constants = {(names.index(k),): v for k, v in constants.items() if k in names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") and name not in l._SCALARS
        }
        for capability in (80, 90, 100):
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", capability, 32),
                options={"enable_fp_fusion": True, "num_warps": l.WARPS},
            )
            ptx = compiled.asm["ptx"]
            assert len(compiled.asm["cubin"]) > 0 and ".local" not in ptx
            vectors = len(re.findall(r"ld\\.global\\.v4", ptx))
            print(kernel.__name__, value, capability, vectors)
            if flag == "ALIGNED":
                # Four vectors a thread and tensor in a filled block, where it may be.
                read = {"_norms_kernel": 2, "_find_kernel": 1, "_moments_kernel": 4}
                tensors = read.get(kernel.__name__, 3)
                state = {"_lars_kernel": 1, "_moments_kernel": 2, "_lamb_kernel": 2}
                want = tensors if value else state.get(kernel.__name__, 0)
                assert vectors == 4 * want, (kernel.__name__, value, vectors)
"""


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_compiles_ahead_of_time(tmp_path):
    pytest.importorskip("triton")
    script = tmp_path / "compile.py"
    script.write_text(textwrap.dedent(AHEAD_OF_TIME))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 39


# On a GPU alone.


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_takes_the_kernels_equals_the_cpu_and_never_syncs(kind, monkeypatch):
    ours = tensors()
    fused = build(kind, ours, None)
    fused.finds_inf, fused.found_inf = True, torch.zeros((), device="cuda")
    assert fused.note == "parameters that are not dense; parameters of torch.float64"
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    theirs = tensors()
    foreach = build(kind, theirs)
    assert foreach.note == "parameters on cpu"
    for step in range(STEPS):
        for params, optimizer in ((ours, fused), (theirs, foreach)):
            set_gradients(params, step)
            set_schedule(optimizer, *schedule(step))
        foreach.step()
        torch.cuda.synchronize()
        with host_syncs(torch.device("cuda"), "forbid"):
            fused.step()
    on_cpu = [p.detach().cpu() for p in ours]
    assert_near((on_cpu, {}), ([p.detach() for p in theirs], {}), 2e-5)


def trained(kind, fused, captured) -> Any:
    """Parameters after steps of two batch sizes, each a graph of its own, and eager ones between.

    The gradients are the graphs' own: they come and go with each step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 5)).cuda()
    optimizer = build(kind, list(model.parameters()), fused, weight_decay=1e-3)
    optimizer.finds_inf, optimizer.found_inf = True, torch.zeros((), device="cuda")
    g = torch.Generator().manual_seed(3)
    inputs = [torch.zeros(size, 30, device="cuda") for size in (16, 9)]

    def step(batch):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in inputs:
            step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    graphs = []
    for batch in inputs if captured else ():
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            step(batch)
    waste = []
    for number in range(12):
        which = number % 2
        values = torch.randn(inputs[which].shape, generator=g)
        if number == 7:
            values[0, 0] = float("nan")
        inputs[which].copy_(values)
        set_schedule(optimizer, *schedule(number))
        if captured and number % 5 != 4:
            graphs[which].replay()
        else:
            waste.append(torch.empty(100_000, device="cuda"))  # Gradients elsewhere each time.
            step(inputs[which])
        assert optimizer.found_inf.item() == (number == 7)
    return snapshot(list(model.parameters()), optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_equal_eager_ones(kind):
    eager = trained(kind, None, captured=False)
    assert all(torch.isfinite(p).all() for p in eager[0])
    assert_near(trained(kind, None, captured=True), eager)
    assert_near(eager, trained(kind, False, captured=False))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_a_resnet50_step(kind):
    model = make_model("r50", seed=0).cuda().to(memory_format=torch.channels_last)
    params = list(model.parameters())
    optimizer = build(kind, params, None)
    assert optimizer.note == ""
    optimizer.finds_inf, optimizer.found_inf = True, torch.zeros((), device="cuda")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in params:
        p.grad = torch.randn_like(p)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    assert 0 < sum(e.device_type == device for e in profiler.events() or ()) <= 20
