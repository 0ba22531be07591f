import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness as measure
import loader_peers
import loader_sides
import numpy as np
import pytest
import throughput
import throughput_report
import throughput_rows
import throughput_tables
import torch
import torch.nn.functional as F
import training_forms
import training_rows
from loader_peers import PEERS, Peer, make_sides
from loader_sides import IMAGE_BYTES, TOLERANCE, Setting, Side, compare
from throughput_rows import Limit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_forms import FORMS, Trainer, Unavailable, make_epoch
from training_work import Work, traffic, work_an_image

from infobatch_fast.data.augment import augmentation
from infobatch_fast.data.cifar import Dataset, make_synthetic
from infobatch_fast.data.loader import TorchLoader
from infobatch_fast.errors import UserError
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.train import graph
from infobatch_fast.train.cli import Interrupted
from infobatch_fast.train.models import make_model
from infobatch_fast.train.step import TrainStep

CPU = torch.device("cpu")
LIMITS = {
    "copy": Limit("copy", 3e9),
    "float32": Limit("float32 convolution", 1e9),
    "bfloat16": Limit("bfloat16 matrix product", 2e9),
}
SAMPLES, BATCH = 160, 64  # the last batch is partial
WITH_WORKERS = ("torchvision v2, DataLoader, 2 workers", "PIL, DataLoader, 2 workers")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return replace(make_synthetic(800, 16), mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


@pytest.fixture
def setting(data: Dataset, tmp_path: Path) -> Setting:
    plan = InfoBatch(len(data.labels), 1, 0.0, seed=3, device="cpu").sample(0)
    return Setting(data, CPU, loader_sides.first(plan, SAMPLES), BATCH, 2, 3, tmp_path)


@pytest.fixture
def bench(data: Dataset, tmp_path: Path) -> Iterator[throughput_rows.Run]:
    lines = measure.Lines(tmp_path / "out" / "lines.jsonl", "throughput", CPU, {}, quick=True)
    yield throughput_rows.Run(data, CPU, lines, lambda line: None, True, 3)
    assert multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that no one else uses."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 9.0, 9.0))


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the peers that may be installed here: they warn, and own threads of their own."""
    monkeypatch.setattr(loader_peers, "PEERS", {})
    monkeypatch.setattr(throughput_rows, "PEERS", {})


def by_hand(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """The pass in numpy: images (K, 3, 32, 32) float64, labels (K,)."""
    data, plan = setting.data, setting.plan
    crops = augmentation(setting.seed, plan.epoch, 0, len(plan), 4, "cpu")
    images = []
    for index, y, x, flip in zip(plan.indices.tolist(), *(c.tolist() for c in crops), strict=True):
        padded = np.pad(data.images[index].numpy(), ((4, 4), (4, 4), (0, 0)), mode="reflect")
        crop = padded[y : y + 32, x : x + 32]
        images.append((crop[:, ::-1] if flip else crop).transpose(2, 0, 1))
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (data.mean, data.std))
    return (np.stack(images) / 255 - mean) / std, data.labels[plan.indices].numpy()


@pytest.mark.parametrize("name", [name for name in make_sides(2) if name not in PEERS])
def test_a_side_gives_the_crops_and_flips_that_numpy_gives(name: str, setting: Setting) -> None:
    side = make_sides(2)[name](setting)
    assert compare(side, setting) is None
    batches = list(side.batches())
    assert [len(labels) for _, labels in batches] == [64, 64, 32]
    images, labels = by_hand(setting)
    assert {images.dtype for images, _ in batches} == {torch.float32}
    np.testing.assert_allclose(torch.cat([b[0] for b in batches]), images, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(torch.cat([b[1] for b in batches]), labels)


@pytest.mark.parametrize("name", list(PEERS))
@pytest.mark.filterwarnings("default")  # the packages' own
def test_a_package_gives_what_ours_gives(name: str, setting: Setting) -> None:
    pytest.importorskip(PEERS[name].package)
    side = PEERS[name].make(setting)
    assert compare(side, setting) is None
    assert sum(len(labels) for _, labels in side.batches()) == SAMPLES


def altered(setting: Setting, alter: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Side:
    right = [
        (images.clone(), labels) for images, labels, _ in setting.reference.epoch(setting.plan)
    ]
    right[1] = alter(*right[1])
    return Side(lambda: right, setting.plan)


def one_level(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    images[63, 2, 31, 31] += 1 / 255 / 0.26
    return images, labels


def slightly_off(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    images[5, 0, 7, 7] += 1e-4
    return images, labels


def no_number(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    images[5, 0, 7, 7] = torch.nan
    return images, labels


def wrong_label(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels.index_fill(0, torch.tensor([9]), 1 - int(labels[9] > 0))


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (one_level, "batch 1: pixels differ by up to 1 of 255 levels"),
        (slightly_off, "batch 1: normalised values differ by up to 1.0e-04, more than 2.0e-06"),
        (no_number, "batch 1: pixels differ by up to nan of 255 levels"),
        (wrong_label, "batch 1: 1 labels differ"),
        (lambda i, n: (i.flip(3), n), "batch 1: pixels differ"),
        (lambda i, n: (i.flip(0), n.flip(0)), "batch 1: pixels differ"),
        (lambda i, n: (i.half(), n), "batch 1: images are torch.float16 (64, 3, 32, 32) on cpu"),
        (lambda i, n: (i[:32], n), "batch 1: images are torch.float32 (32, 3, 32, 32) on cpu"),
        (lambda i, n: (i, n.int()), "batch 1: labels are torch.int32"),
    ],
)
def test_a_corrupted_peer_is_caught(alter, says: str, setting: Setting) -> None:
    assert compare(altered(setting, lambda *batch: batch), setting) is None
    assert (compare(altered(setting, alter), setting) or "").startswith(f"output differs: {says}")


def test_a_pass_of_another_length_is_caught(setting: Setting) -> None:
    right = list(altered(setting, lambda *batch: batch).batches())
    short, long = (Side(lambda b=b: b, setting.plan) for b in (right[:2], [*right, right[0]]))
    assert compare(short, setting) == "output differs: it ends after 2 of 3 batches"
    assert compare(long, setting) == "output differs: it goes on after 3 batches"


def test_a_side_with_its_own_augmentation_is_compared_without_it_and_warmed_up(
    setting: Setting,
) -> None:
    data, timed = setting.data, []
    images = data.images[setting.plan.indices].permute(0, 3, 1, 2).half() / 255
    mean, std = (torch.tensor(v, dtype=torch.half).view(3, 1, 1) for v in (data.mean, data.std))
    half = ((images - mean) / std).float()
    labels = data.labels[setting.plan.indices]
    plain = list(zip(half.split(BATCH), labels.split(BATCH), strict=True))
    side = Side(lambda: timed.append(1) or [], setting.plan, lambda: plain, tolerance=5e-3)
    assert compare(side, setting) is None
    assert timed == [1]
    strict = compare(replace(side, tolerance=TOLERANCE), setting)
    assert strict is not None
    assert "normalised values differ" in strict


def test_bytes_of_an_image() -> None:
    # 3,072 uint8 read, 3,072 float32 written, index and label read, label written
    assert IMAGE_BYTES == 3072 + 12_288 + 24


@pytest.mark.usefixtures("no_packages")
def test_rows_of_loaders(bench: throughput_rows.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measure, "interleave", lambda calls, *a, **k: {name: [0.5, 0.25, 1.0] for name in calls}
    )
    monkeypatch.setattr(loader_sides, "MOST_WITHOUT_WORKERS", 80)
    throughput_rows.run_loaders(bench, {"copy": Limit("copy", 4000.0 * IMAGE_BYTES)}, [50], 200, 1)
    rows = {line["case"]["side"]: line for line in bench.lines.lines if not line["absent"]}
    assert list(rows)[:2] == ["ours, DALI", "ours, torch"]
    assert {name for name in rows if "0 workers" in name} == {
        "torchvision v2, DataLoader, 0 workers",
        "PIL, DataLoader, 0 workers",
    }
    for name, line in rows.items():
        images = 80 if "0 workers" in name else 200
        assert (line["unit"], line["case"]["batch_size"]) == ("images/s", 50)
        assert (line["median"], line["count"]) == (images / 0.5, 3)
        assert line["more"]["pass_images"] == images
        assert line["more"]["copy_limit_percent"] == pytest.approx(100 * images / 0.5 / 4000)
    assert all(line["absent"] is None for line in bench.lines.lines)


def test_a_peer_that_is_missing_or_fails_or_differs_leaves_the_rest(
    bench: throughput_rows.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def no_maker(setting: Setting) -> Side:
        raise OSError("no disk\nfor it")

    def breaking(setting: Setting) -> Side:
        side = make_sides(1)["ours, torch"](setting)

        def batches():
            passes.append(1)
            if len(passes) == 3:
                raise RuntimeError("worker\n  died")
            return side.batches()

        return Side(batches, side.plan)

    def differing(setting: Setting) -> Side:
        return altered(setting, one_level)

    def good(setting: Setting) -> Side:
        return make_sides(1)["ours, torch"](setting)

    makers = {"bad": no_maker, "breaking": breaking, "differing": differing, "good": good}
    monkeypatch.setattr(throughput_rows, "make_sides", lambda workers: makers)
    nothing = Peer("no_such_package_anywhere", "pip install it", no_maker)
    monkeypatch.setattr(throughput_rows, "PEERS", {"peer": nothing})
    throughput_rows.run_loaders(bench, {"copy": Limit("copy", 1e9)}, [BATCH], SAMPLES, 1)
    rows = {line["case"]["side"]: line for line in bench.lines.lines}
    assert rows["peer"]["absent"] == "not installed: pip install it"
    assert rows["bad"]["absent"] == "failed: no disk for it"
    assert rows["breaking"]["absent"] == "failed: worker died"
    assert rows["differing"]["absent"].startswith("output differs: batch 1: pixels differ")
    assert [name for name, row in rows.items() if row["absent"] is None] == ["good"]
    assert rows["good"]["count"] == 3
    assert len(passes) == 3  # the comparison, the first round, and the one that failed


def test_guarded_calls_no_more_after_a_failure_and_lets_a_signal_through() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise ValueError

    guarded = throughput_rows.Guarded(fail)
    guarded()
    guarded()
    assert (calls, guarded.failure) == ([1], "failed: ValueError")

    def stop() -> None:
        raise Interrupted(2, "stopped")

    with pytest.raises(Interrupted):
        throughput_rows.Guarded(stop)()


def test_worker_processes_end_with_their_side(setting: Setting) -> None:
    side = make_sides(2)[WITH_WORKERS[0]](setting)
    loader_sides.run(side)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)  # as a terminal does to all; the main one decides
    loader_sides.run(side)
    assert {w.pid for w in multiprocessing.active_children()} == {w.pid for w in workers}
    del side
    assert multiprocessing.active_children() == []


def test_flop_of_networks_counted_by_hand() -> None:
    # Forward and the weights' gradient; the first layer's input wants none.
    assert work_an_image(nn.Linear(10, 5), 4, (10,)).flop == 2 * (2 * 10 * 5)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 32 * 32, 10)
    )
    convolution, linear = 2 * 8 * (3 * 9) * 32 * 32, 2 * 8 * 32 * 32 * 10
    assert work_an_image(net, 2).flop == 2 * convolution + 3 * linear
    # Published: 0.56 GFLOP (multiply-adds) forward, less the first layer's one gradient.
    assert work_an_image(make_model("r18", seed=0), 2).flop == pytest.approx(6 * 0.5564e9, rel=0.01)


def test_work_of_a_resnet50_an_image() -> None:
    # Known apart from this count: 7.78 GFLOP, and 147 MB in eager bfloat16.
    network = make_model("r50", seed=0)
    before = [tensor.clone() for tensor in network.state_dict().values()]
    work = work_an_image(network, 200, amp="bf16")
    assert work.flop == pytest.approx(7.78e9, rel=1e-3)
    assert work.bytes == pytest.approx(147e6, rel=0.03)
    after = network.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None and not p.is_meta for p in network.parameters())


class _Sum(TorchDispatchMode):
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
        (lambda: A.sum(), 25),
        (lambda: torch.cat([A, A]), 48 + 48),
        (lambda: (A.t(), A.view(24), A[2:], A.detach(), A.expand(2, 6, 4)), 0),
        (lambda: (torch.empty(99), torch.empty_like(A), A.new_empty(7)), 0),
        (lambda: (torch.zeros(7), torch.zeros_like(A), A.new_ones(5)), 7 + 24 + 5),
        (lambda: torch.empty(6, 4).copy_(H), 12 + 24),
        (lambda: torch.empty(9).zero_(), 9),
    ],
)
def test_traffic_of_an_operation(call: Callable[[], object], numbers: int) -> None:
    with _Sum() as moved:
        call()
    assert moved.total == 4 * numbers


def test_traffic_of_convolution_and_batch_norm_backward() -> None:
    batch, size = 4 * 8 * 16 * 16, 8 * 8 * 9
    for first in (True, False):
        images = torch.randn(4, 8, 16, 16, requires_grad=not first)
        weight = torch.randn(8, 8, 3, 3, requires_grad=True)
        with _Sum() as moved:
            result = F.conv2d(images, weight, padding=1)
            assert moved.total == 4 * (2 * batch + size)
            gradient = torch.ones_like(result)
            moved.total = 0
            torch.autograd.grad(result, [weight] if first else [images, weight], gradient)
        # The gradient, the batch and the weight to the weight's gradient; beyond the first layer
        # the gradient again, to the batch's.
        numbers = 2 * batch + 2 * size + (0 if first else 2 * batch)
        assert moved.total == 4 * numbers
    norm = nn.BatchNorm2d(8)
    images = torch.randn(4, 8, 16, 16, requires_grad=True)
    with _Sum() as moved:
        result = norm(images)
        # And vectors: a few reads and writes of a number a channel, and a count.
        assert 0 < moved.total - 4 * 3 * batch <= 4 * 8 * 10
        gradient = torch.ones_like(result)
        moved.total = 0
        result.backward(gradient)
    assert 0 < moved.total - 4 * 5 * batch <= 4 * 8 * 12


def test_the_bytes_are_of_the_precision_and_of_the_batch() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    weights = sum(p.numel() for p in net.parameters())
    works = {size: work_an_image(net, size) for size in (1, 2, 1000)}
    assert len({work.flop for work in works.values()}) == 1
    # Forward the weights are read and backward their gradients written (the second layer's weight
    # is read there too), once a batch.
    of_one = works[1].bytes - 2 * (works[1].bytes - works[2].bytes)
    assert works[1].bytes - of_one == pytest.approx(4 * (2 * weights + 640), rel=0.01)
    assert works[1000].bytes == pytest.approx(of_one + 4 * (2 * weights + 640) / 1000, rel=0.01)
    bf16 = work_an_image(make_model("small", seed=0), 1000, amp="bf16")
    full = work_an_image(make_model("small", seed=0), 1000)
    assert bf16.flop == full.flop
    assert bf16.bytes == pytest.approx(full.bytes / 2, rel=0.03)


def test_arithmetic() -> None:
    assert throughput_rows.percent(50.0, 200.0) == 25.0
    assert training_forms.dataset_rate(1000, 600, 200.0, 0.5) == 1000 / 3.5
    assert training_forms.whole_steps(0.1, 0.25, 50) == 3
    assert training_forms.whole_steps(0.001, 0.5, 50) == 50
    assert training_forms.whole_steps(3.0, 0.5, 50) == 1


def test_epochs_of_full_and_of_pruned_data() -> None:
    full = make_epoch(20_000, 128, 0.0, 5, CPU)
    assert full.infobatch is None
    assert sorted(full.plan.indices.tolist()) == list(range(20_000))
    assert full.plan.weights.unique().tolist() == [1.0]
    pruned = make_epoch(20_000, 128, 0.5, 5, CPU)
    assert pruned.infobatch is not None
    assert 0.79 < pruned.plan.num_prunable / 20_000 < 0.83
    assert len(pruned.plan) % 128 == 0
    assert len(pruned.plan) == pytest.approx(20_000 - pruned.plan.num_prunable / 2, abs=128)
    pruned.infobatch.scores.fill_(1.0)  # a step's doing
    again = pruned.choose()
    assert torch.equal(again.indices, pruned.plan.indices)
    assert torch.equal(again.weights, pruned.plan.weights)


@pytest.mark.parametrize("form", ["eager", "channels_last", "amp"])
def test_a_trainer_trains_on_what_it_says(form: str, data: Dataset) -> None:
    loader = TorchLoader(data.images, data.labels, 50, mean=data.mean, std=data.std)
    epoch = make_epoch(800, 50, 0.5, 1, CPU)
    assert epoch.infobatch is not None
    trainer = Trainer("small", FORMS[form], epoch, data, loader, seed=2)
    seen: list[tuple[Tensor, Tensor]] = []
    step = trainer.step
    assert isinstance(step, TrainStep)

    def spy(images: Tensor, labels: Tensor, batch, lr: float, momentum: float) -> None:
        assert images.is_contiguous() == (form == "eager")
        assert images.is_contiguous(memory_format=torch.channels_last) == (form != "eager")
        seen.append((images, batch.indices))
        step(images, labels, batch, lr, momentum)

    trainer.step = spy  # pyright: ignore[reportAttributeAccessIssue]
    before = [p.detach().clone() for p in step.parameters]
    scores = epoch.infobatch.scores.clone()
    trainer.fed(3)
    assert torch.equal(torch.cat([i for _, i in seen]), epoch.plan.indices[:150])
    changed = (epoch.infobatch.scores != scores).nonzero().squeeze(1)
    assert torch.equal(changed, epoch.plan.indices[:150].sort().values)
    assert not any(torch.equal(p, q) for p, q in zip(before, step.parameters, strict=True))
    seen.clear()
    trainer.resident(2)
    assert seen[0][0] is seen[1][0]
    assert torch.equal(seen[0][1], epoch.plan.indices[:50])
    weight = step.parameters[0]
    assert weight.is_contiguous() == (form == "eager")
    assert step.read_counts().skipped == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch 2.11's own compiler
def test_rows_of_training(bench: throughput_rows.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(calls, *args, **kwargs):
        if set(calls) == {"0.0", "0.5"}:
            return {"0.0": [0.1, 0.1], "0.5": [0.2, 0.2]}
        took = {"loader": 1.0, "resident": 2.0, "fed": 4.0}
        return {name: [took[name.split()[-1]]] * 3 for name in calls}

    monkeypatch.setattr(measure, "interleave", seconds)
    monkeypatch.setattr(training_forms, "whole_steps", lambda *a: 2)
    broken = Trainer

    def trainer(model, form, *args):
        if form.amp == "bf16" and not form.graph:
            raise RuntimeError("no bfloat16")
        return broken(model, form, *args)

    monkeypatch.setattr(training_rows, "Trainer", trainer)
    training_rows.run_training(
        bench, LIMITS, {"small": ("eager", "amp", "graph")}, 0.5, {"small": 100}
    )
    flop, traffic = work_an_image(make_model("small", seed=0), 100)
    full, pruned, *absent = bench.lines.lines
    assert full["case"] == {"model": "small", "batch_size": 100, "form": "eager", "ratio": 0.0}
    assert pruned["case"]["ratio"] == 0.5
    kept = pruned["more"]["epoch_images"]
    assert kept % 100 == 0
    assert 400 <= kept < 800
    for line, images, choose in ((full, 800, 0.1), (pruned, kept, 0.2)):
        more = line["more"]
        assert (line["median"], line["unit"], line["count"]) == (2 * 100 / 4, "images/s", 3)
        assert more["resident_images/s"] == 2 * 100 / 2
        steps = kept // 100  # of the loader alone: as many as the shorter epoch has
        assert more["loader_images/s"] == steps * 100
        share = 100 * steps * 100 * IMAGE_BYTES / 3e9
        assert more["loader_copy_limit_percent"] == pytest.approx(share)
        assert more["compute_limit"] == "float32 convolution"
        assert more["compute_limit_percent"] == pytest.approx(100 * 50 * flop / 1e9)
        assert more["resident_compute_limit_percent"] == pytest.approx(100 * 100 * flop / 1e9)
        assert more["TFLOP/s"] == pytest.approx(50 * flop / 1e12)
        assert more["resident_TFLOP/s"] == pytest.approx(100 * flop / 1e12)
        assert more["copy_limit_percent"] == pytest.approx(100 * 50 * traffic / 3e9)
        assert more["resident_copy_limit_percent"] == pytest.approx(100 * 100 * traffic / 3e9)
        assert (more["image_FLOP"], more["eager_image_bytes"]) == (flop, traffic)
        assert more["dataset_images/s"] == pytest.approx(800 / (choose + images / 50))
        assert (more["epoch_images"], more["choose_s"]) == (images, choose)
    assert full["more"]["well_learned_percent"] == 0
    assert 75 < pruned["more"]["well_learned_percent"] < 87
    assert [line["absent"] for line in absent[:2]] == ["failed: no bfloat16"] * 2
    assert [line["case"]["form"] for line in absent] == ["amp", "amp", "graph", "graph"]
    assert {line["absent"] for line in absent[2:]} == {"CUDA graphs need a CUDA device"}


def test_a_form_is_held_against_the_work_of_its_own_precision(
    bench: throughput_rows.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, str]] = []

    def work(network: nn.Module, batch_size: int, *, amp: str) -> Work:
        counted.append((batch_size, amp))
        return Work(1e6, 4e6 if amp == "off" else 2e6)

    monkeypatch.setattr(training_rows, "work_an_image", work)
    forms = {"small": ("eager", "channels_last", "amp")}
    training_rows.run_training(bench, LIMITS, forms, 0.5, {"small": 100})
    assert sorted(counted) == [(100, "bf16"), (100, "off")]  # once each, whatever the forms
    for line in bench.lines.lines:
        limit, traffic = (2e9, 2e6) if line["case"]["form"] == "amp" else (1e9, 4e6)
        more, rate = line["more"], line["median"]
        assert more["compute_limit_percent"] == pytest.approx(100 * rate * 1e6 / limit)
        assert more["copy_limit_percent"] == pytest.approx(100 * rate * traffic / 3e9)


def trained(bench: throughput_rows.Run) -> dict:
    """A row of training with figures that all differ, in the bench's lines."""
    case = {"model": "r50", "batch_size": 200, "form": "graph", "ratio": 0.5}
    rate = {"median": 20_000.0, "p20": 19_000.0, "p80": 21_000.0, "count": 9}
    more = {
        "compute_limit": "bfloat16 matrix product",
        "TFLOP/s": 155.6,
        "compute_limit_percent": 19.5,
        "copy_limit_percent": 68.4,
        "resident_images/s": 22_000.0,
        "resident_TFLOP/s": 171.2,
        "resident_compute_limit_percent": 21.4,
        "resident_copy_limit_percent": 75.2,
        "loader_images/s": 900_000.0,
        "loader_copy_limit_percent": 0.31,
        "image_FLOP": 7.78e9,
        "eager_image_bytes": 147e6,
        "dataset_images/s": 33_000.0,
    }
    of = {"data": "cifar10", "source": "genuine", "load_average": 0.0, "cores": 9}
    bench.lines._of["options"] |= of
    return bench.lines.add("training", case, "images/s", rate, more)


def test_tables_of_training(bench: throughput_rows.Run) -> None:
    line = trained(bench)
    tables = (throughput_tables.training_table, throughput_tables.work_table)
    rates, work = (
        [[cell.strip() for cell in row.split("|")[1:-1]] for row in table([line])]
        for table in tables
    )
    headers = ["network alone", "fed", "loader alone (% of the copy limit)", "of the data set"]
    assert rates[0][2:] == headers
    name = ["r50, batch 200, graph", "r=0.5"]
    assert rates[2:] == [[*name, "22,000", "20,000", "900,000 (0.310%)", "33,000"]]
    assert work[0] == [
        "TFLOP/s (% of the limit, % of the copy limit*)",
        *("epoch", "limit", "GFLOP an image", "MB an image*", "network alone", "fed"),
    ]
    shares = ["171 (21.4%, 75.2%)", "156 (19.5%, 68.4%)"]
    assert work[2:] == [[*name, "bfloat16 matrix product", "7.78", "147", *shares]]
    text = "\n".join(throughput_tables.summary([line]))
    assert "* of the bytes that an eager step at the form's precision reads and writes" in text
    assert "its share may pass 100%" in text


def test_the_plot_says_what_is_achieved_of_both_limits(
    bench: throughput_rows.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    text = throughput_report.Axes.text

    def spy(self: throughput_report.Axes, x: float, y: float, words: str, **how: Any):
        said.append(words)
        return text(self, x, y, words, **how)

    monkeypatch.setattr(throughput_report.Axes, "text", spy)
    notes: list[str] = []
    monkeypatch.setattr(
        throughput_report.Figure, "supxlabel", lambda self, words, **how: notes.append(words)
    )
    assert throughput_report.draw([trained(bench)], tmp_path / "plot.png")
    assert said == [
        "fed: images/s, TFLOP/s,\n% of arithmetic, of copying*",
        "20,000, 156, 19.5%, 68.4%",
    ]
    assert notes == [throughput_tables.COPYING]


@pytest.fixture
def eager_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form graph on a CPU: what is captured is called again, and nothing is compiled."""

    class Captured:
        def __init__(self, step: graph.GraphStep, inputs: tuple[Tensor, ...]) -> None:
            self.step, self.inputs, self.replayed = step, inputs, 0

        def replay(self) -> None:
            self.replayed += 1
            images, labels, *batch = self.inputs
            self.step.step.advance(images, labels, graph.Batch(*batch), self.step._untimed)

    def capture(self: graph.GraphStep, static: tuple[Tensor, ...]) -> Captured:
        return Captured(self, static)

    for module in (graph, training_forms):
        monkeypatch.setattr(module, "obstacle", lambda step: None)
    monkeypatch.setattr(graph.GraphStep, "_capture", capture)
    monkeypatch.setitem(FORMS, "graph", replace(FORMS["graph"], amp="off", compile=False))


@pytest.mark.usefixtures("eager_graph")
def test_the_form_graph_replays_a_captured_step_once_it_is_warm(data: Dataset) -> None:
    loader = TorchLoader(data.images, data.labels, 50, mean=data.mean, std=data.std)
    trainer = Trainer("small", FORMS["graph"], make_epoch(800, 50, 0.5, 1, CPU), data, loader, 2)
    assert isinstance(trainer.step, graph.GraphStep)
    trainer.warm_up()
    (captured,) = trainer.step._graphs.values()
    before: int = captured.replayed  # pyright: ignore[reportAttributeAccessIssue]
    trainer.resident(2)
    trainer.fed(3)
    assert captured.replayed == before + 5  # pyright: ignore[reportAttributeAccessIssue]
    assert len(trainer.step._graphs) == 1


@pytest.mark.usefixtures("eager_graph")
def test_a_capture_that_fails_is_no_figure(
    bench: throughput_rows.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: graph.GraphStep, inputs: tuple[Tensor, ...]) -> None:
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr(graph.GraphStep, "_capture", fail)
    forms = {"small": ("eager", "graph")}
    training_rows.run_training(bench, LIMITS, forms, 0.5, {"small": 100})
    rows = {(n["case"]["form"], n["case"]["ratio"]): n["absent"] for n in bench.lines.lines}
    why = "operation not permitted when capturing"
    assert rows["eager", 0.0] is rows["eager", 0.5] is None
    for ratio in (0.0, 0.5):
        assert rows["graph", ratio] == why


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch 2.11's own compiler
def test_the_form_graph_is_unavailable_on_a_cpu(data: Dataset) -> None:
    loader = TorchLoader(data.images, data.labels, 50, mean=data.mean, std=data.std)
    epoch = make_epoch(800, 50, 0.5, 1, CPU)
    with pytest.raises(Unavailable, match=r"^CUDA graphs need a CUDA device$"):
        Trainer("small", FORMS["graph"], epoch, data, loader, 2)


def test_the_limit_is_the_higher_of_two_and_has_its_name(
    bench: throughput_rows.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = {"copy_bytes_per_second": 5.0, "matmul_flops_per_second": 2.0}
    monkeypatch.setattr(measure, "limits", lambda *a: most)
    rates = {torch.float32: 3.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(throughput_rows, "_convolution_rate", lambda device, dtype, s: rates[dtype])
    found = throughput_rows.measure_limits(bench, list(rates))
    assert found == {
        "copy": ("copy", 5.0),
        "float32": ("float32 convolution", 3.0),
        "bfloat16": ("bfloat16 matrix product", 2.0),
    }


def test_what_is_measured_by_default() -> None:
    options = throughput.Options()
    cpu = throughput.settle(options, 50_000, cuda=False)
    assert (cpu.batch_sizes, cpu.samples) == ((128, 200, 512, 1024), 8192)
    assert cpu.forms == {"small": ("eager", "channels_last", "amp", "graph"), "r18": ("eager",)}
    cuda = throughput.settle(options, 50_000, cuda=True)
    assert cuda.samples == 50_000
    assert cuda.forms == dict.fromkeys(("small", "r18", "r50"), tuple(FORMS))
    quick = throughput.settle(replace(options, quick=True), 50_000, cuda=False)
    assert (quick.batch_sizes, list(quick.forms)) == ((200,), ["small"])
    given = replace(options, models=("r50",), forms=("amp",), workers=3, batch_sizes=(7,))
    scope = throughput.settle(given, 50_000, cuda=False)
    assert (scope.forms, scope.workers, scope.batch_sizes) == ({"r50": ("amp",)}, 3, (7,))
    assert throughput.settle(replace(options, models=()), 50_000, cuda=False).forms == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--device gpu", "device must be one of auto, cuda, cpu, got gpu (did you mean cuda?)"),
        ("--models r18 r19", "models must be one of r18, r34, r50, r101, small, got r19"),
        (
            "--forms fast",
            "forms must be one of eager, channels_last, amp, compiled, graph, got fast",
        ),
        ("--forms amp amp", "forms must differ from each other, got amp amp"),
        ("--batch-sizes 0", "batch_sizes must be at least 1, got 0"),
        ("--batch-sizes 8 8", "batch_sizes must differ from each other, got 8 8"),
        ("--batch-sizes 128 --samples 100", "batch_sizes must be at most samples = 100, got 128"),
        ("--batch-sizes --models", "models must be at least one where batch_sizes are none"),
        ("--samples 0", "samples must be at least 1, got 0"),
        ("--samples 801", "samples must be at most 800, got 801"),
        ("--workers 0", "workers must be at least 1, got 0"),
        ("--ratio 1", "ratio must be in (0, 1), got 1.0"),
        ("--ratio nan", "ratio must be in (0, 1), got nan"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--seed 9223372036854775808", "seed must be below 2**63, got 9223372036854775808"),
        ("--samples many", "many"),
        ("--nonsense", "nonsense"),
    ],
)
def test_a_wrong_flag_is_one_line(
    words: str, line: str, data: Dataset, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "load_data", lambda seed, say: data)
    out = tmp_path / "out"
    assert throughput.main([*words.split(), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert line in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_folder_in_use_is_one_line(data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(throughput, "load_data", lambda seed, say: data)
    (tmp_path / "mine.txt").write_text("x")
    assert throughput.main(["--quick", "--samples", "300", "--out", str(tmp_path)]) == 2
    assert "error: out must be a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_synthetic_images_stand_in_for_missing_data(tmp_path, monkeypatch, data) -> None:
    monkeypatch.setattr(throughput, "default_data_dir", lambda: tmp_path)
    monkeypatch.setattr(throughput, "make_synthetic", lambda seed: data if seed == 7 else None)
    monkeypatch.delenv("INFOBATCH_DATA", raising=False)
    said: list[str] = []
    assert throughput.load_data(7, said.append) is data
    assert "synthetic" in said[0]
    (tmp_path / "cifar-10-batches-bin").mkdir()
    with pytest.raises(UserError):  # broken data is no missing data
        throughput.load_data(7, said.append)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch 2.11's own compiler
@pytest.mark.usefixtures("no_packages")
def test_a_whole_run(data: Dataset, tmp_path: Path, capsys, monkeypatch) -> None:
    genuine = replace(data, source="genuine")
    monkeypatch.setattr(throughput, "load_data", lambda seed, say: genuine)
    monkeypatch.setenv("INFOBATCH_DATA", str(tmp_path))
    out = tmp_path / "new" / "out"
    words = "--quick --samples 120 --batch-sizes 40 60 --workers 1 --forms eager graph --ratio 0.4"
    assert throughput.main([*words.split(), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = measure.read_lines(out / "throughput.jsonl")
    assert {line["part"] for line in lines} == {"limits", "loaders", "training"}
    sides = list(make_sides(1))
    assert len(sides) == 6
    got = {(n["case"]["side"], n["case"]["batch_size"]) for n in lines if n["part"] == "loaders"
           and not n["absent"]}  # fmt: skip
    assert got == {(side, size) for side in sides for size in (40, 60)}
    ratios = [n["case"]["ratio"] for n in lines if n["part"] == "training" and not n["absent"]]
    assert ratios == [0.0, 0.4]
    for line in lines:
        assert line["quick"] is line["complete"] is True
        assert line["options"]["samples"] == 120
        assert str(tmp_path) not in str(line)
        assert line["absent"] or line["median"] > 0
    assert (out / "throughput.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {"throughput.jsonl", "throughput.png"}
    text = said.out.splitlines()
    assert text[0].startswith("device ")
    assert text[2] == text[-3] == "WARNING: a --quick run: too short to quote"
    assert text[-2].startswith("These are figures of ")
    assert "busy" not in said.out
    assert "images/s (% of the copy limit)" in said.out
    assert said.out.count("| small, batch 200, eager") == 4  # of two epochs in two tables
    assert "TFLOP/s (% of the limit, % of the copy limit*)" in said.out
    assert "may pass 100%" in said.out
    assert "absent: small, 200, graph, 0.4: CUDA graphs need a CUDA device" in said.out
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize(
    ("where", "number", "code"),
    [
        ("in the training", signal.SIGINT, 130),
        ("in the training", signal.SIGTERM, 143),
        ("in a loader's pass", signal.SIGINT, 130),
        ("in the training and in the plot", signal.SIGTERM, 143),
    ],
)
def test_a_signal_keeps_what_was_measured(
    where: str,
    number: int,
    code: int,
    no_limits: None,
    data: Dataset,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ctrl_c(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(throughput, "load_data", lambda seed, say: data)
    if "plot" in where:
        monkeypatch.setattr(throughput_report, "draw", ctrl_c)
    if "training" in where:
        monkeypatch.setattr(throughput, "run_training", ctrl_c)
    else:
        monkeypatch.setattr(measure, "interleave", ctrl_c)
    out = tmp_path / "out"
    words = "--quick --samples 64 --batch-sizes 32 --workers 1"
    assert throughput.main([*words.split(), "--out", str(out)]) == code
    path = out / "throughput.jsonl"
    lines = measure.read_lines(path)
    said = capsys.readouterr()
    assert said.err == f"stopped; {len(lines)} rows are kept in {path}\n"
    assert "stopped" not in said.out
    assert {line["complete"] for line in lines} == {False}
    parts = {line["part"] for line in lines if not line["absent"]}
    assert parts == ({"limits", "loaders"} if "training" in where else {"limits"})
    drawn = where == "in the training"
    assert (out / "throughput.png").exists() == drawn
    if drawn:
        assert title_of(monkeypatch, lines, tmp_path).endswith("; stopped midway\na --quick run: "
                                                               "too short to quote")  # fmt: skip
    assert multiprocessing.active_children() == []


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that take no time to measure."""
    limits = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e9}
    monkeypatch.setattr(measure, "limits", lambda *a: limits)
    monkeypatch.setattr(throughput_rows, "_convolution_rate", lambda *a: 1e9)


def title_of(monkeypatch: pytest.MonkeyPatch, lines: list[dict], tmp_path: Path) -> str:
    titles = []
    monkeypatch.setattr(
        throughput_report.Figure, "suptitle", lambda self, text, **how: titles.append(text)
    )
    assert throughput_report.draw(lines, tmp_path / "title.png")
    return titles[0]


@pytest.mark.usefixtures("no_packages", "no_limits")
def test_others_at_work_and_synthetic_images_are_told_of(
    data: Dataset, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFOBATCH_DATA", str(tmp_path))
    monkeypatch.setattr(throughput, "make_synthetic", lambda seed: data)
    monkeypatch.setattr(throughput, "run_training", lambda *a: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    loads = iter([(2.1, 0.0, 0.0)])
    monkeypatch.setattr(os, "getloadavg", lambda: next(loads))
    out = tmp_path / "out"
    words = "--quick --samples 64 --batch-sizes 32 --workers 1"
    assert throughput.main([*words.split(), "--out", str(out)]) == 0
    busy = "the machine is busy: load average 2.10 of 4 cores: it is faster than these figures"
    warnings = [
        "WARNING: a --quick run: too short to quote",
        f"WARNING: {busy}",
        "WARNING: SYNTHETIC images, as there is no CIFAR-10 in $INFOBATCH_DATA",
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[2:5] == said[-5:-2] == warnings
    lines = measure.read_lines(out / "throughput.jsonl")
    assert {(n["options"]["load_average"], n["options"]["cores"]) for n in lines} == {(2.1, 4)}
    title = title_of(monkeypatch, lines, tmp_path).splitlines()
    assert title[1:] == ["data: synthetic (synthetic)", *(w[9:] for w in warnings[:2])]
    assert measure.cautions({"load_average": 2.0, "cores": 4}, False) == []


def test_the_script_measures_the_checkout_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "infobatch_fast").mkdir()
    (tmp_path / "infobatch_fast" / "__init__.py").write_text("raise SystemExit('another copy')")
    done = subprocess.run(
        [sys.executable, throughput.__file__, "--ratio", "2"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: ratio must be in (0, 1), got 2.0\n")


def test_a_plot_of_nothing_is_none(tmp_path: Path, bench: throughput_rows.Run) -> None:
    bench.lines.add_absent("loaders", {"side": "x"}, "failed")
    assert not throughput_report.draw(bench.lines.lines, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    assert throughput_tables.summary(bench.lines.lines) == ["", "absent: x: failed"]


@pytest.mark.gpu
def test_every_side_delivers_on_the_gpu(setting: Setting) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    indices, weights = setting.plan.indices.to(device), setting.plan.weights.to(device)
    plan = replace(setting.plan, indices=indices, weights=weights)
    there = replace(setting, device=device, plan=plan)
    for name, make in loader_peers.make_sides(2).items():
        if name not in PEERS:
            assert compare(make(there), there) is None, name


@pytest.mark.gpu
@pytest.mark.slow
def test_every_form_trains_on_the_gpu(bench: throughput_rows.Run) -> None:
    run = replace(bench, device=torch.device("cuda", torch.cuda.current_device()))
    training_rows.run_training(run, LIMITS, {"small": tuple(FORMS)}, 0.5, {"small": 100})
    assert [line["absent"] for line in run.lines.lines if line["absent"]] == []
    assert len(run.lines.lines) == 2 * len(FORMS)
