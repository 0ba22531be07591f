"""The kernels of a step's loss, cross-entropy and record, against torch's own operations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infobatch_fast.kernels import cross_entropy, record, reference
from infobatch_fast.kernels.cross_entropy import cross_entropy_gradient
from infobatch_fast.telemetry.syncs import host_syncs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One program up to 32,768 logits, padded: (128, 100) and (2048, 10) are the largest such here.
TABLES = [
    *((1, 2), (2, 10), (127, 2), (200, 10), (200, 100), (128, 100), (2048, 10)),
    *((2049, 10), (5000, 2), (1, 1000), (17, 1000)),
]
# (relative, absolute) to the largest gradient. The interpreter cuts to bfloat16 and does not round.
GRADIENT = {
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (2**-7, 1e-6),
    torch.float16: (2**-10, 1e-6),
}
# NumPy's, for what the interpreter computes with NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, weights 1 or n/k, indices, and scores of which the batch is a third."""
    generator = torch.Generator().manual_seed(batch)
    losses = (torch.rand(batch, generator=generator, dtype=torch.float64) * 4).to(dtype)
    weights = torch.where(torch.rand(batch, generator=generator) < 0.5, 37 / 11, 1.0)
    indices = torch.randperm(3 * batch, generator=generator)[:batch]
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


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def close(a: Tensor, b: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def agree(got: Any, want: Any) -> None:
    """Mean, losses and gradient."""
    close(got[0], want[0], 2e-6)
    close(got[1], want[1], 2e-6, 2e-6)
    relative, absolute = GRADIENT[want[2].dtype]
    least = 2.0**-24 if want[2].dtype == torch.float16 else 0.0
    largest = float(want[2].abs().nan_to_num().max())
    close(got[2], want[2], relative, max(least, absolute * largest))
    assert got[2].is_contiguous()


# record


@pytest.mark.parametrize("found", [None, 0.0, -0.0, 1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_record_is_the_reference(dtype: torch.dtype, found: float | None) -> None:
    for batch, shape in ((1, ()), (200, (1,)), (2049, ())):
        losses, _, indices, scores = make(batch, dtype)
        # 1e300 is finite in float64 alone, and no score.
        special = torch.tensor([torch.inf, torch.nan, -torch.inf, 1e300], dtype=torch.float64)
        count = min(4, batch - 1)
        losses[:count] = special.to(losses)[:count]
        flag = None if found is None else torch.full(shape, found, device=DEVICE)
        before, wanted = scores.clone(), scores.clone()
        reference.record(wanted, indices, losses, flag)
        record.record(scores, indices, losses.requires_grad_(), flag)
        same(scores, wanted)
        assert torch.equal(scores.nan_to_num(-1), before.nan_to_num(-1)) == bool(found)


@pytest.mark.parametrize("bad", [-1, 381, 2**31 - 1, 2**32, -(2**40)])
def test_an_index_out_of_range_writes_nothing(bad: int) -> None:
    losses, _, indices, _ = make(127)
    guarded = torch.full((383,), -7.0, device=DEVICE)
    indices[9] = bad
    rest = torch.arange(127, device=DEVICE) != 9
    wanted = guarded.clone()
    wanted[1:-1][indices[rest]] = losses[rest]
    record.record(guarded[1:-1], indices, losses)  # a view that is not aligned
    same(guarded, wanted)


# cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
def test_cross_entropy_is_torchs(dtype: torch.dtype, smoothing: float) -> None:
    every = dtype == torch.float32 and smoothing == 0.1
    for batch, classes in TABLES if every else (*TABLES[:4], TABLES[-1]):
        _, weights, *_ = make(batch)
        logits, labels = make_logits(batch, classes, dtype)
        for scale in (None, 3.0):
            want = expected(logits, labels, weights, smoothing, scale or 1.0)
            three = None if scale is None else torch.full((1,), scale, device=DEVICE)
            got = cross_entropy_gradient(logits, labels, weights, smoothing, three)
            agree(got, want)
            same(cross_entropy_gradient(logits, labels, weights, smoothing, three), got)


def test_losses_as_exact_as_float32_allows() -> None:
    logits, labels = make_logits(1000, 100)
    logits[:, 0] += 20  # losses from next to nothing to 40
    _, weights, *_ = make(1000)
    for smoothing in (0.0, 0.1):
        _, losses, _ = cross_entropy_gradient(logits, labels, weights, smoothing)
        exact = F.cross_entropy(
            logits.double(), labels, reduction="none", label_smoothing=smoothing
        )
        close(losses.double(), exact, 1e-6, 1e-6)


@pytest.mark.parametrize("classes", [10, 1000])
def test_rows_apart_and_not_aligned(classes: int) -> None:
    wide, labels = make_logits(127, classes + 7, torch.bfloat16)
    labels %= classes
    _, weights, *_ = make(127)
    logits = wide[:, 3:-4]
    want = expected(logits, labels, weights, 0.1)
    agree(cross_entropy_gradient(logits, labels, weights, 0.1), want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [10, 1000])
def test_logits_and_labels_that_are_not_good(classes: int, smoothing: float) -> None:
    logits, labels = make_logits(127, classes)
    _, weights, *_ = make(127)
    other = (labels + 1) % classes
    values = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38)
    cases = [(column, value) for column in (labels, other) for value in values]
    for row, (column, value) in enumerate(cases):
        logits[row, column[row]] = value
    logits[10:13] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)[:, None]
    _, losses, gradient = expected(logits, labels, weights, smoothing)
    assert not losses[[0, 1, 2, 5, 6, 10, 11, 12]].isfinite().any()
    assert losses[13:].isfinite().all()
    # A label out of range, of which torch would stop the device, is NaN.
    labels[20:26] = torch.tensor([-1, classes, -100, 2**32, 1 - 2**32, 1023], device=DEVICE)
    losses[20:26] = gradient[20:26] = torch.nan
    mean = (losses * weights).mean()
    agree(cross_entropy_gradient(logits, labels, weights, smoothing), (mean, losses, gradient))


def test_float16_scaling() -> None:
    # A well-learned sample's gradient, of 1/200 times 1e-5, is lost in float16 without the scale.
    logits, labels = make_logits(200, 10, torch.float16)
    logits[torch.arange(200), labels] += 12
    _, weights, *_ = make(200)
    *_, small = expected(logits, labels, weights, 0.0)
    mean, _, gradient = expected(logits, labels, weights, 0.0, scale=2.0**16)
    assert int((small == 0).sum()) > 2 * int((gradient == 0).sum())
    scale = torch.tensor(2.0**16, device=DEVICE)
    found = cross_entropy_gradient(logits, labels, weights, scale=scale)
    close(found[0], mean, 2e-6, 1e-6)
    # Where 1 - p cancels, float32 leaves a few 1e-7 of scale * weight / B: of 1,100.
    close(found[2], gradient, GRADIENT[torch.float16][0], 1e-3)


# both


def test_empty_batches_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (record, cross_entropy):
        monkeypatch.setattr(module, "launch", None)  # which cannot be called
    losses, weights, indices, _ = make(0)
    scores = torch.ones(3, device=DEVICE)
    record.record(scores, indices, losses)
    logits = torch.rand(0, 10, device=DEVICE)
    mean, losses, gradient = cross_entropy_gradient(logits, indices, weights)
    assert mean.isnan()
    assert (losses.shape, gradient.shape) == ((0,), (0, 10))


REFUSED = [
    *(("losses", lambda x: x.long()), ("losses", lambda x: x[:, None])),
    *(("losses", lambda x: x.repeat(2)[::2]), ("losses", lambda x: x.to("meta"))),
    *(("indices", lambda x: x.int()), ("indices", lambda x: x[1:])),
    *(("scores", lambda x: x.half()), ("scores", lambda x: x[::3])),
    *(("found_inf", lambda x: x.bool()), ("found_inf", lambda x: x.repeat(2))),
    *(("logits", lambda x: x.double()), ("logits", lambda x: x[0])),
    *(("logits", lambda x: x[:, :1]), ("logits", lambda x: x[:, :1].expand(6, 8193))),
    *(("logits", lambda x: x.t().contiguous().t()), ("logits", lambda x: x[:1].expand(6, 10))),
    *(("labels", lambda x: x.int()), ("labels", lambda x: x[:5])),
    *(("weights", lambda x: x.double()), ("weights", lambda x: x.to("meta"))),
    *(("scale", lambda x: x.double()), ("scale", lambda x: x.repeat(3))),
    *(("label_smoothing", lambda x: 1.5), ("label_smoothing", lambda x: torch.nan)),
]


@pytest.mark.parametrize(("name", "spoil"), REFUSED)
def test_refused(name: str, spoil: Any) -> None:
    losses, weights, indices, scores = make(6)
    logits, labels = make_logits(6, 10)
    one = torch.ones((), device=DEVICE)
    recorded = {"scores": scores, "indices": indices, "losses": losses, "found_inf": one}
    given: dict[str, Any] = {"logits": logits, "labels": labels, "weights": weights, "scale": one}
    given["label_smoothing"] = 0.1
    for function, good in ((record.record, recorded), (cross_entropy_gradient, given)):
        if name in good:
            # Of losses elsewhere it is the indices that are not where they are.
            with pytest.raises((TypeError, ValueError), match=rf"^({name}|indices) must "):
                function(**{**good, name: spoil(good[name])})


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "classes"), [(200, 10), (200, 1000), (5000, 10)])
def test_a_graph_replays_what_eager_does_without_a_wait(batch: int, classes: int) -> None:
    _, weights, indices, scores = make(batch)
    logits, labels = make_logits(batch, classes, torch.bfloat16)
    found = torch.zeros((), device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        given = cross_entropy_gradient(logits, labels, weights, 0.1)
        record.record(scores, indices, given[1], found)
        return given

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for flag in (0.0, 1.0):
        logits.copy_(4 * torch.randn_like(logits))
        found.fill_(flag)
        scores.fill_(-7.0)
        with host_syncs(DEVICE, "forbid"):
            eager = step()
        recorded = scores.clone()
        assert bool((recorded == -7.0).all()) == bool(flag)
        for _ in range(50):
            scores.fill_(-7.0)
            graph.replay()
            same(scores, recorded)
            same(captured, eager)
