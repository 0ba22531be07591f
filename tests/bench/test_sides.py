"""What is measured does the work that it says, and a side that does other work is refused."""

from dataclasses import replace
from functools import partial

import numpy as np
import overhead
import pytest
import throughput
import torch
import torch.nn.functional as F
from harness import Absent, Bench
from sides import kernels, loaders, peers, pruning, steps
from sides.pruning import FullData, NumpyPruning
from sides.work import traffic, work_an_image
from steps_made import FakeCuda
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from infobatch_fast.data.loader import make_loader
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Batch
from infobatch_fast.train.models import make_model
from infobatch_fast.train.step import INDUCTOR

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path):
    asked = {"load_average": 0.0, "cores": 2}
    made = Bench(tmp_path / "a.jsonl", CPU, asked, quick=True)
    made.limits = {"copy": 1e9, torch.float32: 1e9}
    return made


# Pruning


@pytest.mark.parametrize(("samples", "ratio"), [(50_000, 0.5), (1000, 0.3), (101, 0.9)])
def test_every_way_to_prune_passes_the_check(samples, ratio):
    scores, losses = pruning.draw_scores(samples, 3), torch.rand(20) + 0.5
    for name in pruning.SIDES:
        pruner = pruning.make_pruner(name, scores, ratio, 0, CPU)
        pruning.check(pruner, scores, 0.0 if name == "none" else ratio, losses)
    for pruner, other in (
        (FullData(samples, 0, CPU), ratio),
        (NumpyPruning(scores, ratio, 0), 0.0),
    ):
        with pytest.raises(Absent):
            pruning.check(pruner, scores, other, losses)


def _replaced(order, place, number):
    order[place] = number
    return order


def _rescaled(host, order, weight):
    host.weights *= weight
    return order


EPOCHS = {
    "twice": lambda host, order: _replaced(order, 0, order[1]),
    "of the prunable": lambda host, order: _replaced(  # one left out in the place of another
        order, host.weights[order].argmin(), np.setdiff1d(np.arange(5000), order)[0]
    ),
    "samples": lambda host, order: np.delete(order, 0),
    "not shuffled": lambda host, order: np.sort(order),
    "is not shuffled": lambda host, order: order[np.argsort(host.weights[order])],
    "n/k": lambda host, order: _rescaled(host, order, 1.02),
}


@pytest.mark.parametrize("says", EPOCHS)
def test_another_epoch_is_refused(says):
    class Mutant(NumpyPruning):
        def choose(self):
            return EPOCHS[says](self, super().choose())

    scores = pruning.draw_scores(5000, 0)
    with pytest.raises(Absent, match=says):
        pruning.check(Mutant(scores, 0.5, 0), scores, 0.5, torch.rand(50))


UPDATES = {
    "the loss": lambda side, losses, batch: NumpyPruning.update(side, losses, batch) * 1.01,
    "the gradient": lambda side, losses, batch: (
        NumpyPruning.update(side, losses.detach(), batch) + losses.sum() - losses.sum()
    ),
    "the scores": lambda side, losses, batch: (
        NumpyPruning.update(side, losses, batch.copy()[::-1])
        and (losses * torch.from_numpy(side.weights[batch])).mean()
    ),
}


@pytest.mark.parametrize("says", UPDATES)
def test_another_update_is_refused(says):
    side = NumpyPruning(scores := pruning.draw_scores(5000, 0), 0.5, 0)
    side.update = lambda losses, batch: UPDATES[says](side, losses, batch)
    with pytest.raises(Absent, match=says):
        pruning.check(side, scores, 0.5, torch.rand(50) + 0.5)


# Loaders


@pytest.fixture(scope="module")
def of():
    data = make_synthetic(300, 10, seed=1)
    plan = InfoBatch(300, 1, delta=0.0, seed=2, device=CPU).sample(0)
    plan = replace(plan, indices=plan.indices[:160], weights=plan.weights[:160])
    return loaders.Pass(data, plan, batch_size=64, workers=1, seed=3)


@pytest.mark.parametrize("name", peers.loader_sides(1))
def test_every_loader_gives_what_ours_gives(of, name):
    side = loaders.loader_side(peers.loader_sides(1)[name], of)
    assert side.images == 160
    side.call()


ALTERED = {
    "pixels": lambda images, labels: (images + 1e-3, labels),
    "nan": lambda images, labels: (images * torch.nan, labels),
    "labels": lambda images, labels: (images, 9 - labels),
    "float16": lambda images, labels: (images.half(), labels),
    "int32": lambda images, labels: (images, labels.int()),
    "differ": lambda images, labels: (images.flip(0), labels.flip(0)),
}


@pytest.mark.parametrize("says", ALTERED)
def test_a_loader_of_another_output_is_refused(of, says):
    right = [(images, labels) for images, labels, _ in of.reference.epoch(of.plan)]
    loaders.compare(right, of)
    with pytest.raises(Absent, match=says):
        loaders.compare([right[0], ALTERED[says](*right[1]), right[2]], of)
    for wrong in (right[:2], [*right, right[0]]):
        with pytest.raises(ValueError, match="zip"):
            loaders.compare(wrong, of)


# Work


def test_flop_and_bytes_of_networks_counted_by_hand():
    # Forward and the weights' gradient; the first layer's input wants none.
    assert work_an_image(nn.Linear(10, 5), 4, (10,)).flop == 2 * (2 * 10 * 5)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 32 * 32, 10)
    )
    convolution, linear = 2 * 8 * (3 * 9) * 32 * 32, 2 * 8 * 32 * 32 * 10
    assert work_an_image(net, 2).flop == 2 * convolution + 3 * linear
    # Known apart from this count: 7.78 GFLOP an image, and 147 MB in eager bfloat16.
    network = make_model("r50", seed=0)
    before = [tensor.clone() for tensor in network.state_dict().values()]
    work = work_an_image(network, 200, amp="bf16")
    assert work.flop == pytest.approx(7.78e9, rel=1e-3)
    assert work.bytes == pytest.approx(147e6, rel=0.03)
    after = network.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Sum(TorchDispatchMode):
    """Adds up the traffic of real operations."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.total += traffic(func, args, kwargs or {}, result)
        return result


A, H = torch.ones(6, 4), torch.ones(6, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda: A + A, 3 * 24),
        (lambda: H + H, 3 * 12),
        (lambda: A.to(torch.bfloat16), 24 + 12),
        (lambda: A.clone().add_(1.0), 2 * 24 + 2 * 24),
        (lambda: A @ A.t(), 24 + 24 + 36),
        (lambda: (A.t(), A.view(24), A[2:], torch.empty(99), A.new_empty(7)), 0),
        (lambda: (torch.zeros(7), torch.zeros_like(A), A.new_ones(5)), 7 + 24 + 5),
        (lambda: torch.empty(6, 4).copy_(H), 12 + 24),
    ],
)
def test_traffic_of_an_operation(call, numbers):
    with Sum() as moved:
        call()
    assert moved.total == 4 * numbers


@pytest.mark.parametrize("first", [True, False])
def test_traffic_of_a_convolutions_backward(first):
    batch, size = 4 * 8 * 16 * 16, 8 * 8 * 9
    images = torch.randn(4, 8, 16, 16, requires_grad=not first)
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    result = F.conv2d(images, weight, padding=1)
    with Sum() as moved:
        torch.autograd.grad(result, [weight] if first else [images, weight], result.detach())
    # The gradient, the batch and the weight to the weight's gradient; beyond the first layer the
    # gradient again, to the batch's.
    assert moved.total == 4 * (2 * batch + 2 * size + (0 if first else 2 * batch))


# Steps


def make_pair(form) -> steps.WithAndWithout:
    infobatch = InfoBatch(400, 1, 0.5, 1.0, seed=0, device=CPU)
    infobatch.scores.copy_(torch.from_numpy(pruning.draw_scores(400, 0)))
    return steps.WithAndWithout("small", "lars", form, infobatch, 20, seed=0)


def test_steps_with_and_without_infobatch_differ_in_infobatch_alone(monkeypatch):
    pair = make_pair(replace(steps.FORMS["channels_last"]))
    one, other = pair.sides["with"], pair.sides["without"]
    assert one.network is other.network
    assert one.optimizer is other.optimizer
    assert (one.plain.infobatch is None, other.plain.infobatch is None) == (False, True)
    scores = one.plain.infobatch.scores  # type: ignore[union-attr]
    before = scores.clone()
    pair.side("without", 2).call()
    assert torch.equal(scores, before)
    pair.side("with", 2).call()
    changed = (scores != before).nonzero().view(-1).tolist()
    trained = torch.cat([batch.indices for _, _, batch in pair.batches[:2]]).tolist()
    assert set(changed) <= set(trained)
    assert len(changed) > 30
    unequal = torch.linspace(0.1, 1.9, 20)  # weights that are not 1 are other work
    monkeypatch.setattr(steps, "Batch", lambda indices, ones: Batch(indices, unequal))
    with pytest.raises(Absent, match="other work"):
        make_pair(replace(steps.FORMS["channels_last"]))


def test_a_captured_form_replays_and_one_that_is_not_captured_is_absent(monkeypatch, bench):
    form = replace(steps.FORMS["channels_last"], graph=True)
    with pytest.raises(ValueError, match="CUDA"):
        make_pair(form)
    cuda = FakeCuda(monkeypatch)
    pair = make_pair(form)
    assert len(cuda.graphs) == 2
    before = [each.replays for each in cuda.graphs]
    pair.side("with", 5).call()
    assert sorted(a.replays - b for a, b in zip(cuda.graphs, before, strict=True)) == [0, 5]
    cuda.fails = RuntimeError("operation not permitted\nwhen capturing")
    options = overhead.Overhead(quick=True, batch_size=20).settle(cuda=False)
    assert overhead.measure_step(bench, options, 400, "captured", form) is None
    (line,) = bench.lines
    assert line.absent is not None
    assert "operation not permitted when capturing" in line.absent


def test_forms_that_are_not_here_are_absent_and_the_rest_is_measured(bench):
    data = make_synthetic(60, 10, seed=1)
    plan = InfoBatch(60, 1, delta=0.0, seed=2, device=CPU).sample(0)
    plain = steps.FORMS["channels_last"]
    forms = {"plain": plain, "graph": replace(plain, graph=True)}
    forms |= {name: change(plain) for name, change in steps.SWITCHES.items()}
    throughput.measure_training(bench, data, plan, "small", 20, forms, seed=0)
    rows = {(line.case["form"], line.case["side"]): line for line in bench.lines}
    for side in ("alone", "fed"):
        assert rows["plain", side].unit == "images/s"
        assert rows["plain", side].more["TFLOP/s"] > 0
        for name in ("graph", *steps.SWITCHES):
            assert rows[name, side].absent, name


def test_loaders_of_files_agree_and_read_half_for_half(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = throughput.Throughput(quick=True, workers=1, files=16)
    throughput.measure_folders(bench, make_synthetic(20, 10, seed=1), options)
    rows = {(line.case["files"], line.case["side"]): line for line in bench.lines}
    assert not [line.absent for line in bench.lines if line.absent and "DALI" not in line.absent]
    whole, half = (rows[files, "ours, Pillow in 1 worker"].more for files in ("all", "half"))
    assert (whole["decoded_images"], half["decoded_images"]) == (16, 8)
    assert half["read_bytes"] == pytest.approx(whole["read_bytes"] / 2, rel=0.1)


def test_each_switch_changes_one_thing_of_the_last_form():
    last = steps.FORMS["graph"]
    assert throughput.Throughput.__dataclass_fields__.keys() >= steps.SWITCHES.keys()
    for change in steps.SWITCHES.values():
        other = change(last)
        assert sum(getattr(other, f) != getattr(last, f) for f in last.__dataclass_fields__) == 1
    known = torch._inductor.config.get_config_copy()  # type: ignore[attr-defined]
    options = steps.SWITCHES["max_autotune"](last).inductor
    assert {*INDUCTOR, *options} <= known.keys()


def test_a_fed_step_trains_on_what_the_loader_gives():
    data = make_synthetic(60, 10, seed=1)
    plan = InfoBatch(60, 1, delta=0.0, seed=2, device=CPU).sample(0)
    options = {"mean": data.mean, "std": data.std, "seed": 0}
    loader, _ = make_loader("torch", data.images, data.labels, 20, **options)
    batches = list(steps.feed(loader, plan, 2))
    assert len(batches) == 2
    assert torch.equal(
        torch.cat([labels for _, labels, _ in batches]), data.labels[plan.indices[:40]]
    )


# Kernels


def cases() -> dict[str, kernels.Case]:
    epoch = {name: kernels.epoch_case(name, 2048, CPU, 0) for name in kernels.EPOCH}
    return {
        **epoch,
        "record": kernels.record_case(200, CPU, 0),
        "cross_entropy": kernels.cross_entropy_case(20, 100, CPU, 0),
        "lars": kernels.lars_case("small", CPU, 0),
    }


def test_torchs_side_does_what_it_must_and_any_other_result_is_refused():
    for name, case in cases().items():
        outputs = case.plain(lambda function: function)(*case.arguments[0])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [output.detach().clone() for output in outputs]
        case.check(*outputs)
        for number, output in enumerate(outputs[:3]):
            changed = output.clone().reshape(-1)
            if changed.is_floating_point():
                changed[changed.isfinite().nonzero()[0]] += 0.1 + changed.nan_to_num(0).abs().max()
            else:
                changed[0] = changed[-1] if changed.numel() > 1 else changed[0] + 1
            wrong = [*outputs[:number], changed.view(output.shape), *outputs[number + 1 :]]
            with pytest.raises((AssertionError, Absent)):
                case.check(*wrong)
        assert case.moved > 0, name


def test_bytes_by_hand():
    moved = {name: case.moved for name, case in cases().items()}
    n = int((kernels.reference.well_learned(cases()["threshold"].arguments[0][0])).sum())
    kept = 2048 - n + round(n / 2)
    assert moved["threshold"] == 4 * 2048
    assert moved["partition"] == (4 + 4 + 4) * 2048
    assert moved["choose"] == (4 + 8 + 4) * kept
    assert moved["shuffle"] == 8 * 2048
    assert moved["choosing"] == moved["threshold"] + moved["partition"] + moved["choose"]
    assert moved["record"] == (4 + 8 + 4) * 200
    assert moved["cross_entropy"] == 2 * 2 * 20 * 100 + (8 + 4 + 4) * 20
    assert moved["lars"] == 7 * 4 * 78_042


def test_no_kernels_is_an_absent_row(bench, monkeypatch):
    build = partial(kernels.record_case, 20, CPU, 0)
    bench.compare("step", {}, kernels.kernel_sides(build, CPU, compiled=False))
    ours, torchs = bench.lines
    assert ours.absent == "the kernels need a CUDA device"
    assert torchs.median is not None
    monkeypatch.setattr(kernels.select, "load", lambda: 1 / 0)
    with pytest.raises(Absent, match="division by zero"):
        kernels.proven(torch.device("cuda", 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them there")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, which interprets
def test_the_kernels_do_what_they_must():
    """All of ours, by Triton's interpreter."""
    ours = kernels.select.load()
    for name, case in cases().items():
        if name != "lars":  # the optimizer takes its kernels by the device
            got = case.ours(ours)(*case.arguments[0])
            case.check(*(got if isinstance(got, tuple) else (got,)))
