"""The update and cross-entropy kernels against torch's own: on a GPU, or in Triton's interpreter.

Whether Triton interprets is settled when it is first imported, so without a GPU the tests of this
file run in a process of their own. `python tests/test_kernels_update.py` compiles the kernels for
GPUs that are not there.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from infobatch_fast.kernels import cross_entropy, reference, update
from infobatch_fast.kernels.cross_entropy import cross_entropy_gradient, cross_entropy_update
from infobatch_fast.telemetry.syncs import host_syncs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
FORMATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 2, 127, 128, 200, 1000, 4096, 4097, 5000]
# One program up to 32,768 logits, padded: (128, 100) and (2048, 10) are the largest such here.
TABLES = [
    *((1, 2), (2, 10), (127, 2), (200, 10), (200, 100), (128, 100), (2048, 10)),
    *((2049, 10), (5000, 2), (1, 1000), (127, 1000)),
]
# (relative, absolute) to the largest gradient. The interpreter cuts to bfloat16 and does not round.
GRADIENT = {
    torch.float64: (1e-14, 1e-15),
    torch.float32: (2e-6, 1e-6),
    torch.bfloat16: (2**-7, 1e-6),
    torch.float16: (2**-10, 1e-6),
}
MEAN = {torch.float64: 1e-13, torch.float32: 2e-6}
# NumPy's, for what the interpreter computes with NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(
    batch: int, dtype: torch.dtype = torch.float32, index: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, weights 1 or n/k, indices, and scores of which the batch is a third."""
    generator = torch.Generator().manual_seed(batch)
    losses = (torch.rand(batch, generator=generator, dtype=torch.float64) * 4).to(dtype)
    weights = torch.where(torch.rand(batch, generator=generator) < 0.5, 37 / 11, 1.0)
    indices = torch.randperm(3 * batch, generator=generator)[:batch].to(index)
    scores = torch.rand(3 * batch, generator=generator)
    scores[::5] = torch.nan
    return losses.to(DEVICE), weights.to(DEVICE), indices.to(DEVICE), scores.to(DEVICE)


def make_logits(
    batch: int, classes: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * batch + classes)
    logits = 4 * torch.randn(batch, classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def expected(
    logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the losses, and the gradient of scale times the mean, by torch."""
    leaf = logits.detach().clone().requires_grad_()
    losses = F.cross_entropy(leaf.float(), labels, reduction="none", label_smoothing=smoothing)
    mean = reference.rescaled_mean(losses, weights)
    (gradient,) = torch.autograd.grad(mean * scale, leaf)
    return mean.detach(), losses.detach(), gradient


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def close(a: Tensor, b: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def close_gradient(a: Tensor, b: Tensor) -> None:
    relative, absolute = GRADIENT[b.dtype]
    least = 2.0**-24 if b.dtype == torch.float16 else 0.0
    close(a, b, relative, max(least, absolute * float(b.abs().nan_to_num().max())))


@pytest.fixture
def launches(monkeypatch) -> Counter[str]:
    """How often each kernel was launched."""
    counts: Counter[str] = Counter()

    class Counted:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            counts[self.name] += 1
            return self.kernel[grid]

    for module, name in (
        (update, "_update_kernel"),
        (update, "_record_kernel"),
        (cross_entropy, "_cross_entropy_kernel"),
    ):
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    return counts


class Operations(TorchDispatchMode):
    """What torch itself was asked for, but for empty memory and views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith("empty") and name not in ("detach", "alias", "new_empty", "set_"):
            self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with Operations() as seen:
        result = call()
    # The interpreter's own, which takes every argument to the host and back.
    return result, [name for name in seen.names if not name.startswith("copy_")]


# update


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("batch", SIZES)
def test_update_is_the_reference(batch: int, dtype: torch.dtype) -> None:
    for index in (torch.int64, torch.int32):
        losses, weights, indices, scores = make(batch, dtype, index)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaf, twin = losses.clone().requires_grad_(), losses.clone().requires_grad_()
        recorded = scores.clone()
        mean = update.update(leaf, weights, indices, scores)
        (mean * 3).backward()
        want = reference.rescaled_mean(twin.to(wide), weights)
        (want * 3).backward()
        reference.record(recorded, indices.long(), losses)
        assert mean.dtype == wide
        close(mean, want, MEAN[wide])
        assert leaf.grad is not None
        assert twin.grad is not None
        close_gradient(leaf.grad, twin.grad)
        same(scores, recorded)


def test_update_accumulates_precisely() -> None:
    # 50,000 losses: an accumulation in 16 bits, or of a kind that drifts, would be far off.
    losses, weights, indices, scores = make(50_000, torch.bfloat16)
    want = (losses.double() * weights.double()).mean().float()
    close(update.update(losses, weights, indices, scores), want, 1e-6)


def test_update_without_record() -> None:
    losses, weights, indices, scores = make(200)
    before = scores.clone()
    leaf, twin = losses.clone().requires_grad_(), losses.clone().requires_grad_()
    mean = update.update(leaf, weights, indices - 1_000_000, scores, record=False)
    mean.backward()
    same(scores, before)
    want = update.update(twin, weights, indices, scores)
    want.backward()
    same(mean, want)
    assert leaf.grad is not None
    assert twin.grad is not None
    same(leaf.grad, twin.grad)
    assert not torch.equal(scores.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_losses_that_are_not_finite(dtype: torch.dtype, value: float) -> None:
    losses, weights, indices, scores = make(127, dtype)
    # 1e300 is finite in float64 alone, and no score.
    losses[5] = torch.tensor(value, dtype=torch.float64).to(dtype)
    recorded, again = scores.clone(), scores.clone()
    mean = update.update(losses, weights, indices, scores)
    wide = losses if dtype == torch.float64 else losses.float()
    close(mean, reference.rescaled_mean(wide, weights), MEAN[mean.dtype])
    reference.record(recorded, indices, losses)
    assert recorded[indices[5]].isnan()
    same(scores, recorded)
    update.record(again, indices, losses)
    same(again, recorded)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [-1, 381, 2**31 - 1, -(2**31), 2**32, -(2**40)])
def test_indices_out_of_range_write_nothing(index: torch.dtype, bad: int) -> None:
    if not torch.iinfo(index).min <= bad <= torch.iinfo(index).max:
        pytest.skip("no such number")
    losses, weights, indices, _ = make(127, index=index)
    guarded = torch.full((383,), -7.0, device=DEVICE)
    inside = guarded[1:-1]
    indices[9] = bad
    rest = torch.arange(127, device=DEVICE) != 9
    want = torch.full_like(inside, -7.0)
    want[indices[rest].long()] = losses[rest]
    for call in (
        lambda: update.update(losses, weights, indices, inside),
        lambda: update.record(inside, indices, losses),
        lambda: cross_entropy_update(*make_logits(127, 10), weights, indices, inside),
        lambda: cross_entropy_update(*make_logits(127, 1000), weights, indices, inside),
    ):
        guarded.fill_(-7.0)
        result = call()
        if isinstance(result, tuple):
            assert result[0].isnan()
            want[indices[rest].long()] = result[1][rest]
        elif result is not None:
            assert result.isnan()
        same(inside, want)
        assert guarded[0] == guarded[-1] == -7.0


@pytest.mark.parametrize("found", [None, 0.0, -0.0, 1.0, -2.0, torch.nan, torch.inf])
def test_record_is_the_reference(found: float | None) -> None:
    for batch, dtype, shape in (
        (1, torch.float16, ()),
        (200, torch.bfloat16, (1,)),
        (5000, torch.float32, ()),
        (4096, torch.float64, (1,)),
    ):
        losses, _, indices, scores = make(batch, dtype, torch.int32)
        losses[0] = torch.inf
        flag = None if found is None else torch.full(shape, found, device=DEVICE)
        recorded = scores.clone()
        reference.record(recorded, indices.long(), losses, flag)
        before = scores.clone()
        update.record(scores, indices, losses, flag)
        same(scores, recorded)
        kept = found is not None and found != 0
        assert torch.equal(scores.nan_to_num(-1), before.nan_to_num(-1)) == kept


def test_record_takes_losses_that_require_a_gradient() -> None:
    losses, _, indices, scores = make(200)
    update.record(scores, indices, losses.requires_grad_())
    same(scores[indices], losses.detach())
    assert not scores.requires_grad


def test_views_that_are_not_aligned() -> None:
    losses, weights, indices, _ = make(200)
    part = slice(3, 130)
    want = reference.rescaled_mean(losses[part], weights[part])
    guarded = torch.full((601,), -7.0, device=DEVICE)
    mean = update.update(losses[part], weights[part], indices[part], guarded[1:])
    close(mean, want, MEAN[torch.float32])
    same(guarded[1:][indices[part]], losses[part])
    assert int((guarded != -7.0).sum()) == 127


def test_update_gradcheck() -> None:
    losses, weights, indices, scores = make(17, torch.float64)
    call = lambda x: update.update(x, weights, indices, scores)  # noqa: E731
    assert torch.autograd.gradcheck(call, losses.requires_grad_())


def test_gradient_of_float16_losses_survives_scaling() -> None:
    # 1/5000 times 2^-13 is below float16's least number: the slopes must be float32.
    losses, weights, indices, scores = make(5000, torch.float16)
    leaf = losses.requires_grad_()
    (update.update(leaf, weights, indices, scores) * 2.0**16).backward()
    assert leaf.grad is not None
    close_gradient(leaf.grad, (weights * (2.0**16 / 5000)).half())


def test_update_launches_once(launches: Counter[str]) -> None:
    for dtype in FORMATS:
        losses, weights, indices, scores = make(5000, dtype)
        leaf = losses.requires_grad_()
        launches.clear()
        mean, names = operations(lambda: update.update(leaf, weights, indices, scores))  # noqa: B023
        assert launches == {"_update_kernel": 1}
        assert names == []
        one = torch.ones_like(mean)
        _, names = operations(lambda: torch.autograd.grad(mean, leaf, one))  # noqa: B023
        assert launches == {"_update_kernel": 1}
        assert len(names) == 1
        assert names[0].startswith("mul.")


def test_record_launches_once(launches: Counter[str]) -> None:
    losses, _, indices, scores = make(5000)
    zero = torch.zeros((), device=DEVICE)
    _, names = operations(lambda: update.record(scores, indices, losses, zero))
    assert launches == {"_record_kernel": 1}
    assert names == []


def test_empty_batches_launch_nothing(launches: Counter[str]) -> None:
    losses, weights, indices, _ = make(0)
    scores = torch.rand(3, device=DEVICE)
    before = scores.clone()
    leaf = losses.requires_grad_()
    mean = update.update(leaf, weights, indices, scores)
    mean.backward()
    assert mean.isnan()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0,)
    update.record(scores, indices, losses, torch.zeros((), device=DEVICE))
    logits = torch.rand(0, 10, device=DEVICE, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    mean, per_sample = cross_entropy_update(logits, labels, weights, indices, scores, 0.1)
    mean.backward()
    assert mean.isnan()
    assert per_sample.shape == (0,)
    assert logits.grad is not None
    mean, per_sample, gradient = cross_entropy_gradient(logits, labels, weights)
    assert mean.isnan()
    assert per_sample.shape == (0,)
    assert gradient.shape == (0, 10)
    same(scores, before)
    assert launches == {}


REFUSED = {
    "losses": [
        (lambda x: x.long(), TypeError, r"^losses must be torch.float32 or .*, got torch.int64$"),
        (lambda x: x.tolist(), TypeError, r"^losses must be .*, got list$"),
        (lambda x: x[:, None], ValueError, r"^losses must have shape \(any,\), got \(6, 1\)$"),
        (lambda x: x[0], ValueError, r"^losses must have shape \(any,\), got \(\)$"),
        (
            lambda x: x.repeat(2)[::2],
            ValueError,
            r"^losses must be contiguous, got strides \(2,\)$",
        ),
    ],
    "weights": [
        (lambda x: x.double(), TypeError, r"^weights must be torch.float32, got torch.float64$"),
        (lambda x: x[:5], ValueError, r"^weights must have shape \(6,\), got \(5,\)$"),
        (
            lambda x: x.requires_grad_(),
            ValueError,
            r"^weights must not require a gradient, got requires_grad=True$",
        ),
        (lambda x: x.to("meta"), ValueError, r"^weights must be on (cpu|cuda:0), got meta$"),
    ],
    "indices": [
        (
            lambda x: x.short(),
            TypeError,
            r"^indices must be torch.int64 or torch.int32, got torch.int16$",
        ),
        (lambda x: x[1:], ValueError, r"^indices must have shape \(6,\), got \(5,\)$"),
        (lambda x: x.repeat(2)[::2], ValueError, r"^indices must be contiguous, got strides"),
    ],
    "scores": [
        (lambda x: x.half(), TypeError, r"^scores must be torch.float32, got torch.float16$"),
        (lambda x: x[None], ValueError, r"^scores must have shape \(any,\), got \(1, 18\)$"),
        (lambda x: x.to("meta"), ValueError, r"^scores must be on (cpu|cuda:0), got meta$"),
        (lambda x: x[::3], ValueError, r"^scores must be contiguous, got strides \(3,\)$"),
        (lambda x: x.requires_grad_(), ValueError, r"^scores must not require a gradient"),
    ],
    "found_inf": [
        (lambda x: x.bool(), TypeError, r"^found_inf must be torch.float32 .*, got torch.bool$"),
        (
            lambda x: x.repeat(2),
            ValueError,
            r"^found_inf must have shape \(\) or \(1,\), got \(2,\)$",
        ),
        (lambda x: x.to("meta"), ValueError, r"^found_inf must be on (cpu|cuda:0), got meta$"),
    ],
    "logits": [
        (
            lambda x: x.double(),
            TypeError,
            r"^logits must be torch.float32 or .*, got torch.float64$",
        ),
        (
            lambda x: x[0],
            ValueError,
            r"^logits must have shape \(any, 2 to 8192\), got \(10,\)$",
        ),
        (lambda x: x[:, :1], ValueError, r"^logits must have shape .*, got \(6, 1\)$"),
        (lambda x: x[:, :1].expand(6, 8193), ValueError, r"^logits must .*, got \(6, 8193\)$"),
        (
            lambda x: x.t().contiguous().t(),
            ValueError,
            r"^logits must have strides \(10 or more, 1\), got \(1, 6\)$",
        ),
        (lambda x: x[:1].expand(6, 10), ValueError, r"^logits must have strides .*, got \(0, 1\)$"),
    ],
    "labels": [
        (lambda x: x.int(), TypeError, r"^labels must be torch.int64, got torch.int32$"),
        (lambda x: x[:5], ValueError, r"^labels must have shape \(6,\), got \(5,\)$"),
        (lambda x: x.to("meta"), ValueError, r"^labels must be on (cpu|cuda:0), got meta$"),
    ],
    "scale": [
        (lambda x: x.double(), TypeError, r"^scale must be torch.float32, got torch.float64$"),
        (lambda x: x.repeat(3), ValueError, r"^scale must have shape \(\) or \(1,\), got \(3,\)$"),
    ],
    "label_smoothing": [
        (lambda x: 1.5, ValueError, r"^label_smoothing must be in \[0, 1\], got 1.5$"),
        (lambda x: torch.nan, ValueError, r"^label_smoothing must be in \[0, 1\], got nan$"),
    ],
}
CALLS = {
    "update": (update.update, "losses weights indices scores"),
    "record": (update.record, "scores indices losses found_inf"),
    "cross_entropy_update": (
        cross_entropy_update,
        "logits labels weights indices scores label_smoothing",
    ),
    "cross_entropy_gradient": (
        cross_entropy_gradient,
        "logits labels weights indices scores label_smoothing scale",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_refusals(call: str, launches: Counter[str]) -> None:
    function, names = CALLS[call]
    losses, weights, indices, scores = make(6)
    before = scores.clone()
    logits, labels = make_logits(6, 10)
    one = torch.ones((), device=DEVICE)
    good = {
        **{"losses": losses, "weights": weights, "indices": indices, "scores": scores},
        **{"found_inf": one, "logits": logits, "labels": labels, "label_smoothing": 0.1},
        "scale": one,
    }
    good = {name: good[name] for name in names.split()}
    for name in good:
        for spoil, error, message in REFUSED[name]:
            value = good[name].clone() if isinstance(good[name], Tensor) else good[name]
            with pytest.raises(error, match=message):
                function(**{**good, name: spoil(value)})
    if "logits" in good:
        for missing, got in (("indices", "no indices"), ("scores", "no scores")):
            with pytest.raises(
                ValueError, match=f"^indices and scores must be given together, got {got}$"
            ):
                function(**{**good, missing: None})
    assert launches == {}
    same(scores, before)
    function(**good)
    assert launches


# cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cross_entropy_is_torchs(dtype: torch.dtype, smoothing: float) -> None:
    for batch, classes in TABLES if smoothing < 1 else TABLES[:4]:
        _, weights, indices, scores = make(batch, index=torch.int32)
        logits, labels = make_logits(batch, classes, dtype)
        mean, losses, gradient = expected(logits, labels, weights, smoothing, scale=3.0)
        recorded, again = scores.clone(), scores.clone()

        leaf = logits.clone().requires_grad_()
        got, per_sample = cross_entropy_update(leaf, labels, weights, indices, scores, smoothing)
        (got * 3).backward()
        close(got, mean, 2e-6)
        close(per_sample, losses, 2e-6, 2e-6)
        assert leaf.grad is not None
        close_gradient(leaf.grad, gradient)
        reference.record(recorded, indices.long(), per_sample)
        same(scores, recorded)

        three = torch.full((1,), 3.0, device=DEVICE)
        found = cross_entropy_gradient(logits, labels, weights, indices, again, smoothing, three)
        close(found[0], mean, 2e-6)
        close(found[1], losses, 2e-6, 2e-6)
        close_gradient(found[2], gradient)
        assert found[2].is_contiguous()
        close(again, recorded, 2e-6, 2e-6)


def test_cross_entropy_gradient_without_scale() -> None:
    _, weights, *_ = make(200)
    for classes in (10, 1000):
        logits, labels = make_logits(200, classes)
        mean, losses, gradient = expected(logits, labels, weights, 0.1)
        found = cross_entropy_gradient(logits.requires_grad_(), labels, weights, None, None, 0.1)
        close(found[0], mean, 2e-6)
        close(found[1], losses, 2e-6, 2e-6)
        close_gradient(found[2], gradient)
        logits.backward(found[2])
        assert logits.grad is not None
        same(logits.grad, found[2])
        assert not any(tensor.requires_grad for tensor in found)


def test_losses_as_exact_as_float32_allows() -> None:
    logits, labels = make_logits(1000, 100)
    logits[:, 0] += 20  # losses from next to nothing to 40
    _, weights, *_ = make(1000)
    for smoothing in (0.0, 0.1):
        _, losses = cross_entropy_update(logits, labels, weights, label_smoothing=smoothing)
        exact = F.cross_entropy(
            logits.double(), labels, reduction="none", label_smoothing=smoothing
        )
        close(losses.double(), exact, 1e-6, 1e-6)


def test_rows_apart_and_not_aligned() -> None:
    for classes in (10, 1000):
        wide, labels = make_logits(127, classes + 7, torch.bfloat16)
        labels %= classes
        _, weights, *_ = make(127)
        logits = wide[:, 3:-4]
        assert logits.stride() == (classes + 7, 1)
        mean, losses, gradient = expected(logits, labels, weights, 0.1)
        leaf = logits.detach().requires_grad_()
        assert leaf.stride() == logits.stride()
        got, per_sample = cross_entropy_update(leaf, labels, weights, None, None, 0.1)
        got.backward()
        close(got, mean, 2e-6)
        close(per_sample, losses, 2e-6, 2e-6)
        assert leaf.grad is not None
        close_gradient(leaf.grad, gradient)
    one = torch.rand(1, 10, device=DEVICE).as_strided((1, 10), (1, 1))
    label = torch.tensor([3], device=DEVICE)
    close(cross_entropy_update(one, label, weights[:1])[1], F.cross_entropy(one, label)[None], 2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [10, 1000])
def test_logits_that_are_not_finite(classes: int, smoothing: float) -> None:
    logits, labels = make_logits(127, classes)
    _, weights, indices, scores = make(127)
    other = (labels + 1) % classes
    rows = torch.arange(127, device=DEVICE)
    for row, (column, value) in enumerate(
        (column, value)
        for column in (labels, other)
        for value in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38)
    ):
        logits[row, column[row]] = value
    logits[10:13] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)[:, None]
    _, losses, gradient = expected(logits, labels, weights, smoothing)
    assert not losses[[0, 1, 2, 5, 6, 10, 11, 12]].isfinite().any()
    assert losses[13:].isfinite().all()
    found = cross_entropy_gradient(logits, labels, weights, indices, scores, smoothing)
    close(found[1], losses, 2e-6, 2e-6)
    close_gradient(found[2], gradient)
    assert not found[0].isfinite()
    same(scores[indices], torch.where(losses.isfinite(), found[1], torch.nan))
    assert rows[losses.isnan()].tolist() == rows[found[1].isnan()].tolist()


def test_labels_out_of_range_are_nan() -> None:
    for batch, classes in ((200, 10), (127, 1000)):
        logits, labels = make_logits(batch, classes)
        _, weights, indices, scores = make(batch)
        _, losses, gradient = expected(logits, labels, weights, 0.1)
        bad = torch.tensor([-1, classes, -100, 2**32, 1 - 2**32, 1023], device=DEVICE)
        labels[:6] = bad
        losses[:6] = torch.nan
        gradient[:6] = torch.nan
        found = cross_entropy_gradient(logits, labels, weights, indices, scores, 0.1)
        assert found[0].isnan()
        close(found[1], losses, 2e-6, 2e-6)
        close_gradient(found[2], gradient)
        same(scores[indices], found[1])


def test_float16_scaling() -> None:
    # A well-learned sample's gradient, of 1/200 times 1e-5, is lost in float16 without the scale.
    logits, labels = make_logits(200, 10, torch.float16)
    logits[torch.arange(200), labels] += 12
    _, weights, *_ = make(200)
    scale = torch.tensor(2.0**16, device=DEVICE)
    *_, small = expected(logits, labels, weights, 0.0)
    mean, _, gradient = expected(logits, labels, weights, 0.0, scale=2.0**16)
    assert int((small == 0).sum()) > 2 * int((gradient == 0).sum())
    found = cross_entropy_gradient(logits, labels, weights, scale=scale)
    close(found[0], mean, 2e-6, 1e-6)
    # Where 1 - p cancels, float32 leaves a few 1e-7 of scale * weight / B: of 1,100.
    relative, absolute = GRADIENT[torch.float16][0], 1e-3
    close(found[2], gradient, relative, absolute)
    leaf = logits.clone().requires_grad_()
    (cross_entropy_update(leaf, labels, weights)[0] * scale).backward()
    assert leaf.grad is not None
    close(leaf.grad, gradient, relative, absolute)


@pytest.mark.parametrize(
    ("classes", "forward"),
    [
        (10, {"_cross_entropy_kernel": 1}),
        (100, {"_cross_entropy_kernel": 1}),
        (1000, {"_cross_entropy_kernel": 1, "_update_kernel": 1}),
    ],
)
def test_cross_entropy_launches(
    classes: int, forward: dict[str, int], launches: Counter[str]
) -> None:
    _, weights, indices, scores = make(200)
    logits, labels = make_logits(200, classes, torch.bfloat16)
    logits.requires_grad_()
    call = lambda: cross_entropy_update(logits, labels, weights, indices, scores, 0.1)  # noqa: E731
    (mean, losses), names = operations(call)
    assert launches == forward
    assert names == []
    assert not losses.requires_grad
    launches.clear()
    one = torch.ones((), device=DEVICE)
    (gradient,), names = operations(lambda: torch.autograd.grad(mean, logits, one))
    assert launches == {"_cross_entropy_kernel": 1}
    assert names == []
    assert gradient.dtype == torch.bfloat16
    launches.clear()
    found, names = operations(lambda: cross_entropy_gradient(logits, labels, weights))
    assert launches == forward
    assert names == []
    assert found[2].dtype == torch.bfloat16


def test_cross_entropy_has_one_derivative() -> None:
    _, weights, *_ = make(6)
    logits, labels = make_logits(6, 10)
    mean, _ = cross_entropy_update(logits.requires_grad_(), labels, weights)
    with pytest.raises(
        RuntimeError, match=r"^cross_entropy_update must not be differentiated twice$"
    ):
        torch.autograd.grad(mean, logits, create_graph=True)


def test_called_again_it_gives_the_same_bits() -> None:
    for batch, classes in ((200, 10), (50, 1000)):
        _, weights, indices, scores = make(batch)
        logits, labels = make_logits(batch, classes)
        first = cross_entropy_gradient(logits, labels, weights, indices, scores, 0.1)
        other, _ = make_logits(batch + 1, classes)
        for tensor in (other[:-1], logits):
            again = cross_entropy_gradient(tensor, labels, weights, indices, scores, 0.1)
        for a, b in zip(first, again, strict=True):
            same(a, b)


def test_no_host_sync() -> None:
    losses, weights, indices, scores = make(50)
    logits, labels = make_logits(50, 1000)
    leaf, zero = losses.requires_grad_(), torch.zeros((), device=DEVICE)

    def call() -> None:
        update.update(leaf, weights, indices, scores).backward()
        update.record(scores, indices, leaf, zero)
        cross_entropy_update(logits.requires_grad_(), labels, weights)[0].backward()
        cross_entropy_gradient(logits, labels, weights, indices, scores, 0.1, zero)

    call()  # compiles, which may wait
    with host_syncs(DEVICE, "forbid"):
        call()


def test_compiled_it_is_traced_whole(launches: Counter[str]) -> None:
    losses, weights, indices, scores = make(200)
    logits, labels = make_logits(200, 10)

    def step(x: Tensor, z: Tensor, first: Tensor, second: Tensor, found: Tensor) -> Tensor:
        mean = update.update(x, weights, indices, first)
        update.record(first, indices, x * 2, found)
        other, per_sample = cross_entropy_update(z, labels, weights, indices, second, 0.1)
        traced = cross_entropy_gradient(z, labels, weights, None, None, 0.1, found)
        return mean + other + per_sample.sum() + 0 * traced[2].sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for call in (step, compiled):
        x, z = losses.clone().requires_grad_(), logits.clone().requires_grad_()
        first, second = scores.clone(), scores.clone()
        found = torch.ones((), device=DEVICE)
        value = call(x, z, first, second, found)
        value.backward()
        results.append((value.detach(), x.grad, z.grad, first, second))
    for eager, traced in zip(*results, strict=True):
        close(traced, eager, 1e-5, 1e-6)
    assert sum(launches.values()) == 5  # the eager step's alone


# on a GPU


@pytest.mark.gpu
def test_a_graph_replays_what_eager_does() -> None:
    for batch, classes in ((200, 10), (200, 1000), (5000, 10)):
        losses, weights, indices, scores = make(batch)
        logits, labels = make_logits(batch, classes, torch.bfloat16)
        found = torch.zeros((), device=DEVICE)
        leaf, z = losses.requires_grad_(), logits.requires_grad_()

        def step() -> tuple[Tensor, ...]:
            mean = update.update(leaf, weights, indices, scores, record=False)  # noqa: B023
            (slopes,) = torch.autograd.grad(mean, leaf)  # noqa: B023
            value, per_sample = cross_entropy_update(z, labels, weights)  # noqa: B023
            (gradient,) = torch.autograd.grad(value, z)  # noqa: B023
            direct = cross_entropy_gradient(z, labels, weights, None, None, 0.1)  # noqa: B023
            update.record(scores, indices, per_sample, found)  # noqa: B023
            return (mean, slopes, value, per_sample, gradient, *direct)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for flag in (0.0, 1.0):
            with torch.no_grad():
                leaf.copy_(torch.rand_like(leaf))
                z.copy_(4 * torch.randn_like(z))
            found.fill_(flag)
            scores.fill_(-7.0)
            eager = [tensor.clone() for tensor in step()]
            recorded = scores.clone()
            assert bool((recorded == -7.0).all()) == bool(flag)
            for _ in range(2):
                scores.fill_(-7.0)
                graph.replay()
                same(scores, recorded)
                for a, b in zip(captured, eager, strict=True):
                    same(a, b)


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits() -> None:
    losses, weights, indices, scores = make(50_000)
    for batch, classes in ((200, 10), (5000, 100)):
        logits, labels = make_logits(batch, classes)
        first = None
        for _ in range(100):
            mean = update.update(losses, weights, indices, scores)
            part = slice(0, batch)
            found = cross_entropy_gradient(
                logits, labels, weights[part], indices[part], scores, 0.1
            )
            now = (mean, *found, scores.clone())
            first = first or now
            for a, b in zip(now, first, strict=True):
                same(a, b)


# ahead of time


class Launch:
    """In a kernel's place: compiles what would have been launched, for GPUs that are not there."""

    def __init__(self, kernel: Any, folder: Path) -> None:
        self.kernel, self.folder = kernel, folder

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        values = {**dict(zip(names, args, strict=False)), **options}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            if isinstance(value, Tensor):
                signature[name] = f"*{KINDS[value.dtype]}"
                if name in ("logits_ptr", "gradient_ptr"):  # the two that are looked at for it
                    attributes[(place,)] = [["tt.divisibility", 16]]
            elif value is None or name.isupper():
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "i32"
        options = {name: value for name, value in options.items() if name not in names}
        assert options["enable_fp_fusion"] is True
        for capability in (80, 90, 100):
            compiled = triton.compile(
                ASTSource(self.kernel, signature, constants, attributes),
                target=GPUTarget("cuda", capability, 32),
                options=options,
            )
            assert f".target sm_{capability}" in compiled.asm["ptx"]
            cubin = self.folder / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = subprocess.run(
                [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            # Registers that did not fit would be on the stack.
            assert " STACK:0 " in usage, (self.kernel.fn.__name__, signature, constants, usage)
            assert " LOCAL:0 " in usage
            print(self.kernel.fn.__name__, capability, len(cubin.read_bytes()))


KINDS = {
    **{torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"},
    **{torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"},
}


def compile_ahead(folder: Path) -> None:
    """Compile every form of the kernels; prints a line for each."""
    for module, name in (
        (update, "_update_kernel"),
        (update, "_record_kernel"),
        (cross_entropy, "_cross_entropy_kernel"),
    ):
        setattr(module, name, Launch(getattr(module, name), folder))
    for dtype, index, record in (
        *((torch.float32, torch.int64, True), (torch.bfloat16, torch.int32, True)),
        (torch.float64, torch.int64, False),
    ):
        losses, weights, indices, scores = make(6, dtype, index)
        leaf = losses.clone().requires_grad_(record)
        update.update(leaf, weights, indices, scores, record=record)
        update.record(scores, indices, losses, weights[:1] if record else None)
    for batch, classes, dtype, both in (
        *((200, 2, torch.float16, False), (200, 10, torch.bfloat16, True)),
        *((127, 1000, torch.bfloat16, True), (127, 8192, torch.float32, False)),
    ):
        _, weights, indices, scores = make(batch)
        logits, labels = make_logits(batch, classes, dtype)
        cross_entropy_gradient(logits, labels, weights, indices, scores, 0.1, weights[0])
        if both:
            leaf = logits.clone().requires_grad_()
            cross_entropy_update(leaf, labels, weights, indices, scores, 0.1)[0].backward()
            cross_entropy_gradient(logits, labels, weights)


@pytest.mark.slow
def test_compiles_for_gpus_that_are_not_there(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {(name, capability) for name, capability, _ in lines} == {
        (name, capability)
        for name in ("_update_kernel", "_record_kernel", "_cross_entropy_kernel")
        for capability in ("80", "90", "100")
    }
    assert all(int(size) > 1000 for *_, size in lines)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs in this process")
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        compile_ahead(Path(name))
elif DEVICE.type == "cpu" and not INTERPRETED:
    for name in [name for name in globals() if name.startswith("test_")]:
        if name not in ("test_in_the_interpreter",):
            del globals()[name]
