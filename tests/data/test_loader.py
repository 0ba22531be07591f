import gc
import pickle
import random
import sys
import weakref
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from torch.utils._python_dispatch import TorchDispatchMode

from infobatch_fast.data import loader as loader_module
from infobatch_fast.data.augment import augmentation
from infobatch_fast.data.loader import DaliLoader, TorchLoader, make_loader
from infobatch_fast.errors import UserError
from infobatch_fast.infobatch import InfoBatch, Plan
from infobatch_fast.telemetry.syncs import host_syncs

try:
    import nvidia.dali

    HAS_DALI = nvidia.dali.__version__ is not None
except ImportError:
    HAS_DALI = False

needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
either = pytest.mark.parametrize("kind", [TorchLoader, pytest.param(DaliLoader, marks=needs_dali)])

PIXELS: dict[str, Any] = {
    "mean": (0.0, 0.0, 0.0),
    "std": (1 / 255, 1 / 255, 1 / 255),
}  # output = pixel value
CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small gain nothing from more, and lose seconds to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_images(n, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


def random_plan(num_samples, k, epoch=0, seed=0, device="cpu"):
    """Unequal weights, each a function of its sample alone, so that a mispairing shows."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    indices = torch.randperm(num_samples, generator=generator)[:k].to(device)
    return Plan(epoch, num_samples, 0, indices, weight_of(indices))


def weight_of(ids):
    return 1 + ids.float() / 8  # exact on every device


def label_of(ids):
    return ids * 31 % 101


def numbered_images(n, height=8, width=8):
    """Images of one colour, which spells their number: no crop or flip changes them."""
    ids = torch.arange(n)
    colours = torch.stack([ids % 256, ids // 256, ids * 13 % 256], 1).to(torch.uint8)
    return colours[:, None, None, :].expand(n, height, width, 3).contiguous(), label_of(ids)


def numbers_in(images):
    """(B,) int64: the number that every pixel of every image spells; -1 where they differ."""
    values = images.round().long().permute(0, 2, 3, 1).flatten(1, 2)
    colour = values[:, 0]
    ids = colour[:, 0] + 256 * colour[:, 1]
    same = (values == colour[:, None]).all(2).all(1) & (ids * 13 % 256 == colour[:, 2])
    return torch.where(same, ids, -1)


def assert_batches(batches, plan, batch_size, start_batch=0, count=None):
    """The batches are the plan's, from start_batch on: images, labels, indices and weights."""
    batches = list(batches)
    starts = list(range(0, len(plan), batch_size))[start_batch:][:count]
    assert len(batches) == len(starts)
    for start, (images, labels, batch) in zip(starts, batches, strict=True):
        expected = plan.indices[start : start + batch_size]
        assert torch.equal(numbers_in(images), expected)
        assert torch.equal(labels, label_of(expected))
        assert torch.equal(batch.indices, expected)
        assert torch.equal(batch.weights, weight_of(expected))


def transformed(image, pad, y, x, flip):
    """The same augmentation by torchvision: (H, W, C) -> (C, H, W) uint8."""
    height, width, _ = image.shape
    chw = image.permute(2, 0, 1)
    if pad:
        chw = vision.pad(chw, [pad], padding_mode="reflect")
    chw = vision.crop(chw, int(y), int(x), height, width)
    return vision.hflip(chw) if flip else chw


def all_images(batches):
    return torch.cat([images for images, _, _ in batches])


# Pixels


@either
def test_every_crop_and_flip_is_torchvisions(kind, monkeypatch):
    table = [(y, x, flip) for y in range(9) for x in range(9) for flip in (False, True)]
    y, x, flip = (torch.tensor(values) for values in zip(*table, strict=True))
    monkeypatch.setattr(
        loader_module,
        "augmentation",
        lambda seed, epoch, start, stop, pad, device: (
            y[start:stop],
            x[start:stop],
            flip[start:stop],
        ),
    )
    images = random_images(162)
    plan = random_plan(162, 162)
    loader = kind(images, torch.arange(162), 50, **PIXELS)
    out = all_images(loader.epoch(plan))
    expected = torch.stack(
        [transformed(images[i], 4, *crop) for i, crop in zip(plan.indices, table, strict=True)]
    )
    assert torch.equal(out.round(), expected.float())
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=1e-4)


@either
@pytest.mark.parametrize(
    ("height", "width", "pad"),
    [(32, 32, 4), (12, 20, 4), (20, 12, 3), (9, 7, 6), (8, 8, 0), (5, 6, 2), (1, 1, 0)],
)
def test_random_crops_are_torchvisions(kind, height, width, pad):
    images = random_images(40, height, width)
    plan = random_plan(40, 33, epoch=2)
    loader = kind(images, torch.arange(40), 8, **PIXELS, pad=pad, seed=9)
    out = all_images(loader.epoch(plan))
    crops = zip(*augmentation(9, 2, 0, 33, pad, "cpu"), strict=True)
    expected = torch.stack(
        [transformed(images[i], pad, *crop) for i, crop in zip(plan.indices, crops, strict=True)]
    )
    assert torch.equal(out.round(), expected.float())


@either
def test_without_augmentation_the_images_come_as_they_are(kind):
    images = random_images(30, 10, 12)
    before = images.clone()
    plan = random_plan(30, 30)
    out = all_images(kind(images, torch.arange(30), 8, **PIXELS, augment=False).epoch(plan))
    assert torch.equal(out.round(), images[plan.indices].permute(0, 3, 1, 2).float())
    assert torch.equal(images, before)


@either
def test_normalisation_is_torchvisions(kind):
    images = random_images(64)
    plan = random_plan(64, 64)
    out = all_images(kind(images, torch.arange(64), 64, **CIFAR, augment=False).epoch(plan))
    pixels = images[plan.indices].permute(0, 3, 1, 2).float() / 255
    expected = vision.normalize(pixels, list(CIFAR["mean"]), list(CIFAR["std"]))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert out.dtype == torch.float32


@either
def test_batches_are_channels_last(kind):
    chunk: dict[str, Any] = {} if kind is TorchLoader else {"chunk": 3}
    loader = kind(random_images(20, 12, 9), torch.arange(20), 8, **CIFAR, **chunk)
    for images, labels, _ in loader.epoch(random_plan(20, 20)):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.shape[1:] == (3, 12, 9)
        assert labels.dtype == torch.int64


@either
def test_images_that_are_not_contiguous(kind):
    images = random_images(20).permute(0, 2, 1, 3)
    plan = random_plan(20, 20)
    loaders = [kind(x, torch.arange(20), 8, **PIXELS) for x in (images, images.contiguous())]
    a, b = (all_images(loader.epoch(plan)) for loader in loaders)
    assert torch.equal(a, b)


@either
def test_more_than_two_gigabytes_of_images(kind):
    n = 720_000
    images = torch.from_numpy(np.zeros((n, 32, 32, 3), np.uint8))  # pages that nothing has touched
    assert images.numel() > 2**31
    images[-3:] = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1, 1)
    plan = Plan(0, n, 0, torch.tensor([n - 1, 0, n - 2, n - 3]), torch.ones(4))
    ((out, labels, _),) = kind(images, torch.arange(n), 4, **PIXELS, pad=0).epoch(plan)
    assert torch.equal(out.round().mean((1, 2, 3)), torch.tensor([3.0, 0.0, 2.0, 1.0]))
    assert torch.equal(labels, plan.indices)


# The same batches whatever the loader, its look-ahead and the start


@needs_dali
@pytest.mark.parametrize(
    ("prefetch", "chunk", "threads"), [(1, 1, 1), (2, 1, 2), (3, 4, 1), (4, 5, 3)]
)
@pytest.mark.parametrize("start", [0, 3, 11])
def test_both_loaders_yield_the_same(prefetch, chunk, threads, start):
    images, labels = random_images(100, 16, 16), torch.arange(100) % 10
    plan = random_plan(100, 93, epoch=4)
    options = {**CIFAR, "seed": 3}
    whole = list(TorchLoader(images, labels, 8, **options).epoch(plan))
    dali = DaliLoader(images, labels, 8, **options, prefetch=prefetch, chunk=chunk, threads=threads)
    exact = list(DaliLoader(images, labels, 8, **options).epoch(plan))
    batches = list(dali.epoch(plan, start))
    assert len(batches) == 12 - start
    for mine, other, same in zip(batches, whole[start:], exact[start:], strict=True):
        assert torch.equal(mine[0], same[0])
        torch.testing.assert_close(mine[0], other[0], rtol=0, atol=1e-6)
        assert torch.equal(mine[1], other[1])
        assert torch.equal(mine[2].indices, other[2].indices)
        assert torch.equal(mine[2].weights, other[2].weights)


@either
def test_augmentation_changes_with_the_epoch_and_the_seed_alone(kind):
    images, labels = random_images(64, 16, 16), torch.arange(64)
    order = random_plan(64, 64)
    epochs = [Plan(e, 64, 0, order.indices, order.weights) for e in (0, 1)]
    loader = kind(images, labels, 16, **CIFAR, seed=1)
    first, other_epoch, again = (all_images(loader.epoch(epochs[e])).clone() for e in (0, 1, 0))
    other_seed = all_images(kind(images, labels, 16, **CIFAR, seed=2).epoch(epochs[0]))
    assert torch.equal(first, again)
    for other in (other_epoch, other_seed):
        assert (first != other).flatten(1).any(1).float().mean() > 0.9


@either
def test_global_generators_are_left_alone(kind):
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    loader = kind(random_images(20), torch.arange(20), 8, **CIFAR)
    batches = list(loader.epoch(random_plan(20, 20)))
    assert len(batches) == 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(np.random.get_state()) == before[2]


# Which sample is which, through every way to run and to leave an epoch

LOOK_AHEAD = [
    pytest.param(DaliLoader, {"prefetch": p, "chunk": c}, marks=needs_dali, id=f"dali-{p}-{c}")
    for p, c in ((1, 1), (2, 1), (4, 1), (1, 5), (2, 3), (3, 2), (4, 5))
]
every = pytest.mark.parametrize(
    ("kind", "ahead"), [pytest.param(TorchLoader, {}, id="torch"), *LOOK_AHEAD]
)


def numbered(kind, ahead, n=500, batch_size=16, **options):
    return kind(*numbered_images(n), batch_size, **PIXELS, **ahead, **options)


@every
def test_epochs_of_varying_length(kind, ahead):
    loader = numbered(kind, ahead)
    for epoch, k in enumerate([500, 1, 15, 16, 17, 0, 160, 499, 32]):
        plan = random_plan(500, k, epoch)
        batches = loader.epoch(plan)
        assert len(batches) == -(-k // 16)
        assert_batches(batches, plan, 16)


@every
def test_a_start_in_mid_epoch(kind, ahead):
    loader = numbered(kind, ahead)
    plan = random_plan(500, 250)
    for start in (0, 1, 4, 7, 15, 16):
        batches = loader.epoch(plan, start)
        assert len(batches) == 16 - start
        assert_batches(batches, plan, 16, start)


@every
def test_an_epoch_starts_anew_at_each_iteration(kind, ahead):
    plan = random_plan(500, 100)
    batches = numbered(kind, ahead).epoch(plan)
    for _ in range(2):
        assert_batches(batches, plan, 16)
    assert_batches(islice(batches, 2), plan, 16, count=2)
    assert_batches(batches, plan, 16)


def leave_by_break(loader, plan, after):
    for i, _ in enumerate(loader.epoch(plan)):
        if i == after:
            break


def leave_by_exception(loader, plan, after):
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for i, _ in enumerate(loader.epoch(plan)):
            assert 1 / (after - i) > 0


def leave_by_dropping(loader, plan, after):
    iterator = iter(loader.epoch(plan))
    for _ in range(after + 1):
        next(iterator)
    del iterator


def leave_by_closing(loader, plan, after):
    iterator = iter(loader.epoch(plan))
    for _ in range(after + 1):
        next(iterator)
    iterator.close()


def leave_unread(loader, plan, after):
    assert len(loader.epoch(plan)) == 17
    iter(loader.epoch(plan))


def leave_by_an_error_while_looking_ahead(loader, plan, after):
    wrong = plan.indices.clone()
    wrong[16 * (after + 1)] = 10**6
    with pytest.raises((IndexError, RuntimeError), match="index"):
        list(loader.epoch(Plan(plan.epoch, 500, 0, wrong, plan.weights)))


@every
@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_exception,
        leave_by_dropping,
        leave_by_closing,
        leave_unread,
        leave_by_an_error_while_looking_ahead,
    ],
)
def test_an_abandoned_epoch_leaves_nothing_behind(kind, ahead, leave):
    loader = numbered(kind, ahead)
    for epoch, (after, k) in enumerate([(0, 100), (2, 37), (15, 500), (4, 5)]):
        leave(loader, random_plan(500, 270, epoch), after)
        plan = random_plan(500, k, epoch, seed=1)
        assert_batches(loader.epoch(plan), plan, 16)
        leave(loader, random_plan(500, 270, epoch), after)
    start = random_plan(500, 270, 9)
    assert_batches(loader.epoch(start, 5), start, 16, 5)


@every
@pytest.mark.parametrize("taken", [1, 2, 3, 7])
def test_an_older_iterator_refuses_or_goes_on_but_never_mixes(kind, ahead, taken):
    loader = numbered(kind, ahead)
    old, new = random_plan(500, 200, 0), random_plan(500, 150, 1)
    older = iter(loader.epoch(old))
    first = list(islice(older, taken))
    newer = iter(loader.epoch(new))
    second = list(islice(newer, 2))
    if kind is DaliLoader:
        with pytest.raises(RuntimeError, match="this iteration has ended: its loader has begun"):
            next(older)
        assert list(older) == []
    else:
        first += older
    second += newer
    assert_batches(first, old, 16, count=len(first))
    assert_batches(second, new, 16)


@every
def test_an_epoch_that_is_only_asked_for_disturbs_none(kind, ahead):
    loader = numbered(kind, ahead)
    plan = random_plan(500, 100)
    batches = iter(loader.epoch(plan))
    taken = [next(batches)]
    assert len(loader.epoch(random_plan(500, 300, 1))) == 19
    assert_batches([*taken, *batches], plan, 16)


@every
def test_batches_kept_are_not_overwritten(kind, ahead):
    loader = numbered(kind, ahead)
    plans = [random_plan(500, 200, epoch) for epoch in range(4)]
    kept = [list(loader.epoch(plan)) for plan in plans]
    del loader
    gc.collect()
    for batches, plan in zip(kept, plans, strict=True):
        assert_batches(batches, plan, 16)


@either
@pytest.mark.parametrize(
    ("n", "k", "batch_size"), [(1, 1, 1), (1, 1, 8), (9, 5, 8), (8, 8, 8), (9, 9, 1)]
)
def test_small_sizes(kind, n, k, batch_size):
    plan = random_plan(n, k)
    loader = numbered(kind, {}, n, batch_size)
    assert_batches(loader.epoch(plan), plan, batch_size)


@either
def test_a_sample_may_come_twice(kind):
    indices = torch.tensor([3, 3, 0, 3, 1])
    plan = Plan(0, 9, 0, indices, weight_of(indices))
    assert_batches(numbered(kind, {}, 9, 2).epoch(plan), plan, 2)


@either
def test_with_infobatch(kind):
    infobatch = InfoBatch(num_samples=500, num_epochs=4, delta=0.75, device="cpu")
    loader = numbered(kind, {})
    lengths = []
    for epoch in range(4):
        plan = infobatch.sample(epoch)
        lengths.append(len(plan))
        seen = []
        for images, labels, batch in loader.epoch(plan):
            ids = numbers_in(images)
            assert torch.equal(ids, batch.indices)
            assert torch.equal(labels, label_of(ids))
            infobatch.update(ids.float(), batch)
            seen.append(ids)
        assert torch.equal(torch.cat(seen), plan.indices)
    assert lengths == [500, 375, 375, 500]
    assert torch.equal(infobatch.scores, torch.arange(500.0))


class NoReadBack(TorchDispatchMode):
    """Fails where a tensor's value is read on the host, which on a GPU waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ):
            raise AssertionError(f"{func} reads back")
        return func(*args, **(kwargs or {}))


@either
def test_iterating_reads_nothing_back(kind):
    loader = numbered(kind, {})
    plan = random_plan(500, 100)
    with NoReadBack():
        with pytest.raises(AssertionError, match="reads back"):
            int(plan.indices[0])
        batches = list(loader.epoch(plan, 1))
    assert_batches(batches, plan, 16, 1)


@needs_dali
def test_a_dropped_loader_frees_its_pipeline_and_its_images():
    loader = numbered(DaliLoader, {"prefetch": 3})
    iterator = iter(loader.epoch(random_plan(500, 200)))
    next(iterator)
    gc.collect()
    gc.disable()
    try:
        held = [weakref.ref(x) for x in (loader._padded, loader._source, loader._pipeline)]
        del loader
        assert all(ref() is not None for ref in held)  # the iterator holds them
        del iterator
        assert [ref() for ref in held] == [None, None, None]
    finally:
        gc.enable()


# Errors


@either
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"^batch_size must be at least 1, got 0$"),
        ({"pad": -1}, r"^pad must be in \[0, 6\), the images' shorter side, got -1$"),
        ({"pad": 6}, r"^pad must be in \[0, 6\), the images' shorter side, got 6$"),
        ({"mean": (0.5,)}, r"^mean must hold 3 numbers, got \(0.5,\)$"),
        ({"std": (1, 0, 1)}, r"^std must hold 3 numbers above 0, got \(1, 0, 1\)$"),
        ({"std": (1, 1)}, r"^std must hold 3 numbers above 0, got \(1, 1\)$"),
        (
            {"images": np.zeros((4, 6, 8, 3), np.uint8)},
            r"^images must be a torch tensor, got ndarray$",
        ),
        ({"labels": [1, 2, 3, 0]}, r"^labels must be a torch tensor, got list$"),
        (
            {"images": torch.zeros(4, 6, 8, 3)},
            r"^images must be uint8 of shape \(N, H, W, 3\), "
            r"got torch.float32 of shape \(4, 6, 8, 3\)$",
        ),
        (
            {"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)},
            r"^images must be uint8 of shape \(N, H, W, 3\), "
            r"got torch.uint8 of shape \(4, 3, 8, 8\)$",
        ),
        (
            {"labels": torch.zeros(5, dtype=torch.int64)},
            r"^labels must be int64 of shape \(4,\), got torch.int64 of shape \(5,\)$",
        ),
        (
            {"labels": torch.zeros(4)},
            r"^labels must be int64 of shape \(4,\), got torch.float32 of shape \(4,\)$",
        ),
        (
            {"labels": torch.zeros(4, dtype=torch.int64, device="meta")},
            r"^labels must be on cpu like images, got meta$",
        ),
    ],
)
def test_wrong_arguments(kind, change, message):
    arguments = {"images": torch.zeros(4, 6, 8, 3, dtype=torch.uint8)}
    arguments |= {"labels": torch.zeros(4, dtype=torch.int64), "batch_size": 2, **CIFAR}
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**(arguments | change))


@pytest.mark.parametrize("name", ["prefetch", "chunk", "threads"])
def test_wrong_look_ahead(name):
    message = f"^{name} must be at least 1, got 0$"
    with pytest.raises(ValueError, match=message):
        numbered(DaliLoader, {name: 0})
    with pytest.raises(ValueError, match=message):
        make_loader("torch", *numbered_images(4), 2, **CIFAR, **{name: 0})


@either
def test_wrong_epochs(kind):
    loader = numbered(kind, {})
    plan = random_plan(500, 100)
    for start in (-1, 8):
        with pytest.raises(ValueError, match=rf"^start_batch must be in \[0, 7\], got {start}$"):
            loader.epoch(plan, start)
    meta = Plan(0, 500, 0, plan.indices.to("meta"), plan.weights)
    with pytest.raises(ValueError, match=r"^plan.indices must be on cpu like images, got meta$"):
        loader.epoch(meta)
    narrow = Plan(0, 500, 0, plan.indices.int(), plan.weights)
    with pytest.raises(
        ValueError, match=r"must be int64 of shape \(K,\), got torch.int32 of shape"
    ):
        loader.epoch(narrow)


# make_loader


def test_make_loader_torch():
    plan = random_plan(50, 50)
    loader, note = make_loader("torch", *numbered_images(50), 16, **PIXELS, chunk=3)
    assert type(loader) is TorchLoader
    assert note is None
    assert_batches(loader.epoch(plan), plan, 16)


@needs_dali
@pytest.mark.parametrize("kind", ["auto", "dali"])
def test_make_loader_dali(kind):
    plan = random_plan(50, 50)
    loader, note = make_loader(kind, *numbered_images(50), 16, **PIXELS, prefetch=3, chunk=2)
    assert type(loader) is DaliLoader
    assert note is None
    assert_batches(loader.epoch(plan), plan, 16)


def test_make_loader_without_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    plan = random_plan(50, 50)
    loader, note = make_loader("auto", *numbered_images(50), 16, **PIXELS)
    assert type(loader) is TorchLoader
    assert note is not None
    assert note.startswith("WARNING: loader auto is torch, as DALI does not import (")
    assert "\n" not in note
    assert_batches(loader.epoch(plan), plan, 16)
    with pytest.raises(UserError, match=r"^loader dali needs NVIDIA DALI, .*pip install") as caught:
        make_loader("dali", *numbered_images(50), 16, **PIXELS)
    assert "\n" not in str(caught.value)


def test_make_loader_where_dali_does_not_work(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error 35:\n  driver too old")

    monkeypatch.setattr(loader_module, "DaliLoader", fail)
    loader, note = make_loader("auto", *numbered_images(50), 16, **PIXELS)
    assert type(loader) is TorchLoader
    assert note is not None
    assert note.endswith("as DALI does not work here (CUDA error 35: driver too old)")
    message = "^loader dali does not work here: CUDA error 35: driver too old$"
    with pytest.raises(UserError, match=message):
        make_loader("dali", *numbered_images(50), 16, **PIXELS)


def test_make_loader_hides_no_wrong_argument():
    with pytest.raises(UserError, match=r"^loader must be one of auto, dali, torch, got dail "):
        make_loader("dail", *numbered_images(4), 2, **CIFAR)
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        make_loader("auto", *numbered_images(4), 0, **CIFAR)


# On a GPU


@pytest.mark.gpu
@needs_cuda
@every
@pytest.mark.parametrize("augment", [True, False])
def test_cuda_yields_the_batches_of_the_cpu(kind, ahead, augment):
    images, labels = random_images(300), torch.arange(300) % 10
    options = {**CIFAR, "seed": 5, "augment": augment}
    on_cpu = TorchLoader(images, labels, 16, **options)
    on_cuda = kind(images.cuda(), labels.cuda(), 16, **options, **ahead)
    for epoch, (k, start) in enumerate([(300, 0), (77, 2), (1, 0), (0, 0), (160, 10)]):
        expected = on_cpu.epoch(random_plan(300, k, epoch), start)
        batches = on_cuda.epoch(random_plan(300, k, epoch, device="cuda"), start)
        assert len(batches) == len(expected)
        for mine, other in zip(batches, expected, strict=True):
            assert mine[0].is_cuda
            assert mine[0].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(mine[0].cpu(), other[0], rtol=0, atol=1e-6)
            assert torch.equal(mine[1].cpu(), other[1])
            assert torch.equal(mine[2].indices.cpu(), other[2].indices)
            assert torch.equal(mine[2].weights.cpu(), other[2].weights)


@pytest.mark.gpu
@needs_cuda
@every
@pytest.mark.parametrize("own_stream", [False, True])
def test_cuda_slow_consumers_read_no_overwritten_batch(kind, ahead, own_stream):
    """The host runs ahead of a consumer that sleeps on the device, reads, and ruins its input."""
    n, batch_size = 4096, 64
    images, labels = numbered_images(n, 32, 32)
    loader = kind(images.cuda(), labels.cuda(), batch_size, **PIXELS, **ahead)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        seen, expected = [], []
        for epoch in range(5):
            plan = random_plan(n, n, epoch, device="cuda")
            count = 50 if epoch % 2 else 64  # every other epoch is left early
            for batch_images, batch_labels, batch in islice(loader.epoch(plan), count):
                torch.cuda._sleep(2_000_000)  # about 1 ms
                ids = numbers_in(batch_images)
                same = (label_of(ids) == batch_labels) & (weight_of(ids) == batch.weights)
                seen.append(torch.where(same & (ids == batch.indices), ids, -2))
                batch_images.fill_(-1)
            expected.append(random_plan(n, n, epoch).indices[: batch_size * count])
            del plan
            torch.full((n,), -1, device="cuda")  # takes memory that the plan may have given back
        result = torch.cat(seen).cpu()
    assert torch.equal(result, torch.cat(expected))


@pytest.mark.gpu
@needs_cuda
@every
def test_cuda_iterating_does_not_wait_for_the_device(kind, ahead):
    images, labels = numbered_images(500)
    loader = kind(images.cuda(), labels.cuda(), 16, **PIXELS, **ahead)
    plan = random_plan(500, 200, device="cuda")
    list(loader.epoch(plan))  # what is allocated or compiled once may wait
    torch.cuda.synchronize()
    with host_syncs(torch.device("cuda"), "forbid"):
        iterator = iter(loader.epoch(plan, 1))
        # Work of half a second stands before the batches: the host must run ahead of it. torch's
        # debug mode does not see a wait inside DALI; an event that is not over does.
        torch.cuda._sleep(1_000_000_000)
        behind = torch.cuda.Event()
        behind.record()
        batches = [next(iterator)]
        assert not behind.query()
        batches += list(iterator)
    on_cpu = random_plan(500, 200)
    assert_batches(
        [(x.cpu(), y.cpu(), type(b)(*(t.cpu() for t in b))) for x, y, b in batches], on_cpu, 16, 1
    )


@pytest.mark.gpu
@needs_cuda
@either
def test_cuda_refuses_a_plan_of_the_cpu(kind):
    images, labels = numbered_images(20)
    loader = kind(images.cuda(), labels.cuda(), 16, **PIXELS)
    with pytest.raises(ValueError, match=r"^plan.indices must be on cuda:0 like images, got cpu$"):
        loader.epoch(random_plan(20, 20))
