"""The fifteen defects known of the original InfoBatch package, each shown to be absent here."""

import copy
import multiprocessing
import pickle
import random
import subprocess
import sys
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from infobatch_fast import Batch, InfoBatch, TorchLoader
from infobatch_fast.telemetry.syncs import host_syncs


def make(n: int = 300, epochs: int = 8, **kwargs) -> InfoBatch:
    infobatch = InfoBatch(n, epochs, **{"device": "cpu", "delta": 1.0, **kwargs})
    infobatch.scores.copy_(torch.rand(n, generator=torch.Generator().manual_seed(0)))
    return infobatch


def make_loader(n: int = 300, batch_size: int = 32) -> TorchLoader:
    images = (torch.arange(n) % 251).to(torch.uint8).view(n, 1, 1, 1).expand(n, 32, 32, 3)
    return TorchLoader(
        images.contiguous(), torch.arange(n), batch_size, mean=(0.0,) * 3, std=(1 / 255,) * 3
    )


@pytest.mark.parametrize("drop_last", [True, False])
def test_1_an_epoch_ends_and_is_drawn_once(drop_last: bool) -> None:
    infobatch = make()
    for epoch in range(6):
        plan = infobatch.sample(epoch)
        assert len(plan) < 300  # still pruning, epoch after epoch
        sampler = BatchSampler(plan.indices.tolist(), 32, drop_last=drop_last)
        data: Any = range(300)
        drawn = [index for batch in DataLoader(data, batch_sampler=sampler) for index in batch]
        expected = plan.indices[: len(plan) // 32 * 32] if drop_last else plan.indices
        assert [int(index) for index in drawn] == expected.tolist()
        epoch_of_loader = make_loader().epoch(plan)
        for _ in range(2):  # iterating again draws nothing anew
            seen = [i for _, _, batch in epoch_of_loader for i in batch.indices.tolist()]
            assert seen == plan.indices.tolist()


@pytest.mark.parametrize(("epochs", "delta"), [(90, 0.875), (200, 0.07), (7, 0.5), (11, 0.3)])
def test_2_annealing_epochs_have_weight_one(epochs: int, delta: float) -> None:
    infobatch = make(epochs=epochs, delta=delta)
    first = floor(epochs * Fraction(str(delta)))
    for epoch in range(epochs):
        weights = infobatch.sample(epoch).weights
        assert bool((weights == 1).all()) == (epoch >= first)
        assert (weights.numel() == 300) == (epoch >= first)


@pytest.mark.parametrize("n", [50_000, 1_000_003, 1_048_579, 1_281_167])
def test_3_unseen_samples_are_never_pruned(n: int) -> None:
    infobatch = InfoBatch(n, 8, device="cpu")
    plan = infobatch.sample(0)
    assert len(plan) == n
    assert plan.num_prunable == 0
    half = torch.arange(0, n, 2)
    infobatch.update(torch.linspace(4, 9, half.numel()), Batch(half, torch.ones(half.numel())))
    kept = torch.zeros(n, dtype=torch.bool)
    plan = infobatch.sample(1)
    kept[plan.indices] = True
    assert kept[1::2].all()
    assert not kept[::2].all()
    assert (plan.weights[plan.indices % 2 == 1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 5), (1,), ()])
def test_4_losses_of_any_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    infobatch = InfoBatch(8, 8, device="cpu")
    losses = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
    size = shape[0] if shape else 1
    loss = infobatch.update(losses, infobatch.sample(0).batch(0, size))
    loss.backward()
    assert loss.item() == 0.5
    assert losses.grad is not None
    assert losses.grad.sum().item() == pytest.approx(1, rel=1e-2)
    assert (infobatch.scores == 0.5).sum() == size


def test_5_indices_beyond_the_exact_range_of_floats() -> None:
    n = 2**24 + 16
    infobatch = InfoBatch(n, 8, device="cpu")
    indices = torch.tensor([2**24 + 1, 2**24 + 3, 49_999, 65_535])
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    infobatch.update(losses, Batch(indices, torch.ones(4)))
    assert infobatch.scores[indices].tolist() == [1, 2, 3, 4]
    assert infobatch.scores.isfinite().sum() == 4
    plan = infobatch.sample(1)
    assert plan.indices.dtype == torch.int64
    assert plan.indices.bincount(minlength=n).max() == 1


def test_6_importing_changes_nothing_of_torch_and_any_sample_works() -> None:
    code = (
        "from torch.utils.data import DataLoader\n"
        "from torch.utils.data.dataloader import _BaseDataLoaderIter as base\n"
        "before = dict(vars(DataLoader)), dict(vars(base))\n"
        "import infobatch_fast\n"
        "infobatch_fast.InfoBatch, infobatch_fast.TorchLoader\n"
        "assert before == (dict(vars(DataLoader)), dict(vars(base)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    infobatch = make()
    data = [{"image": torch.full((2,), float(i)), "label": i} for i in range(300)]
    plan = infobatch.sample(1)
    loader = DataLoader(data, batch_size=32, sampler=plan.indices.tolist())  # pyright: ignore
    for sample, batch in zip(loader, plan.batches(32), strict=True):
        assert sample["label"].tolist() == batch.indices.tolist()
        infobatch.update(sample["image"].mean(1) + 1, batch)
        assert torch.equal(infobatch.scores[batch.indices], batch.indices + 1.0)


def test_7_looking_ahead_cannot_mispair_losses() -> None:
    infobatch = make()
    loader = make_loader()
    plan = infobatch.sample(1)
    batches = list(loader.epoch(plan))  # the whole epoch is fetched before the first update
    random.Random(0).shuffle(batches)
    for images, labels, batch in batches:
        assert torch.equal(labels, batch.indices)
        infobatch.update(images[:, 0, 0, 0] + 1000, batch)
    assert torch.equal(infobatch.scores[plan.indices], plan.indices % 251 + 1000.0)


@pytest.mark.parametrize("function", [torch.exp, torch.sqrt, torch.sigmoid, torch.tanh])
def test_8_rescaling_keeps_autograd_intact(function) -> None:
    infobatch = make()
    plan = infobatch.sample(1)
    batch = plan.batch(0, 16)
    assert (batch.weights != 1).any()
    inputs = torch.rand(16, dtype=torch.float64, requires_grad=True)
    losses = function(inputs)
    kept = losses.detach().clone()
    infobatch.update(losses, batch).backward()
    assert torch.equal(losses, kept)
    other = inputs.detach().clone().requires_grad_()
    (function(other) * batch.weights.double()).mean().backward()
    torch.testing.assert_close(inputs.grad, other.grad)


def _plan_of(infobatch: InfoBatch, results) -> None:
    results.put(infobatch.sample(1).indices.tolist())


def test_9_copies_pickles_and_spawned_workers() -> None:
    infobatch = make(30)
    expected = infobatch.sample(1).indices.tolist()
    assert copy.deepcopy(infobatch).sample(1).indices.tolist() == expected
    assert pickle.loads(pickle.dumps(infobatch)).sample(1).indices.tolist() == expected
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_plan_of, args=(infobatch, results))
    worker.start()
    try:
        assert results.get(timeout=120) == expected
    finally:
        worker.join(timeout=120)
    assert worker.exitcode == 0


def test_10_the_users_randomness_is_their_own() -> None:
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), random.random(), torch.rand(()).item()
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    infobatch = make()
    for epoch in range(3):
        list(make_loader().epoch(infobatch.sample(epoch)))
    assert (np.random.rand(), random.random(), torch.rand(()).item()) == expected
    kept = [set(make(seed=seed).sample(1).indices.tolist()) for seed in range(4)]
    assert all(kept[0] != other for other in kept[1:])


def test_11_the_length_is_true_before_the_epoch() -> None:
    infobatch, loader = make(), make_loader()
    lengths = set()
    for epoch in range(6):
        batches = loader.epoch(infobatch.sample(epoch))
        length = len(batches)
        assert length == sum(1 for _ in batches)
        lengths.add(length)
        infobatch.scores.pow_(1.5)  # another share is below the mean in every epoch
    assert len(lengths) > 1


def test_12_one_bad_loss_neither_stops_pruning_nor_prunes_everything() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        infobatch = make()
        clean = infobatch.sample(1).num_prunable
        infobatch.update(torch.tensor([value]), Batch(torch.tensor([7]), torch.ones(1)))
        plan = infobatch.sample(1)
        assert abs(plan.num_prunable - clean) < 10
        assert 7 in plan.indices.tolist()
        assert plan.weights[plan.indices == 7].item() == 1


def test_13_training_can_be_resumed(tmp_path) -> None:
    infobatch = make()
    torch.save(infobatch.state_dict(), tmp_path / "state.pt")
    other = InfoBatch(300, 8, delta=1.0, device="cpu")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for epoch in range(8):
        mine, theirs = infobatch.sample(epoch), other.sample(epoch)
        assert torch.equal(mine.indices, theirs.indices)
        assert torch.equal(mine.weights, theirs.weights)


@pytest.mark.parametrize("ratio", [-0.5, 1.0, 1.5, float("nan"), float("inf")])
def test_14_a_ratio_out_of_range_is_an_error(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"^ratio must be in \[0, 1\), got "):
        InfoBatch(10, 8, ratio=ratio, device="cpu")


def test_15_update_reads_nothing_back() -> None:
    infobatch = make()
    plan = infobatch.sample(1)
    with host_syncs(torch.device("cpu"), "count") as reads:
        for batch in plan.batches(32):
            infobatch.update(torch.rand(batch.indices.numel()), batch)
    assert reads.count == 0
    assert infobatch.sample(1).indices.device == infobatch.scores.device


@pytest.mark.gpu
def test_15_scores_and_plans_live_on_the_gpu() -> None:
    infobatch = InfoBatch(1000, 8)
    plan = infobatch.sample(0)
    assert infobatch.scores.is_cuda
    assert plan.indices.is_cuda
    assert plan.weights.is_cuda
    losses = torch.ones(100, device="cuda")
    with host_syncs(torch.device("cuda"), "forbid"):
        infobatch.update(losses, plan.batch(0, 100))
